"""Memory, disk space and cores that this process may use, within its container's limits."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fluxmoe.errors import ConfigError
from fluxmoe.words import line as one_line

#: Root of the file system, under which ``/proc`` and ``/sys`` are read.
ROOT = Path("/")
#: The remedy if ``huge_pages`` returns False.
HUGE_PAGES = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (speed only)"


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """Memory that this process may use, in bytes.

    Attributes:
        total, available: Size of the memory, and the part that can be allocated without swapping.
        limit: The cgroup that limits the memory; empty if the machine is the limit.
    """

    total: int
    available: int
    limit: str = ""


def memory() -> MemoryRoom:
    """Return the memory of the machine, or of the process's smallest cgroup (version 1 or 2).

    A cgroup's page cache counts as available, because the kernel reclaims it on demand.
    """
    import psutil

    machine = psutil.virtual_memory()
    found = MemoryRoom(int(machine.total), int(machine.available))
    for folder in _cgroups():
        cap = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        if cap is None:
            continue
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        room = max(cap - max(used - _page_cache(folder), 0), 0)
        if cap < found.total:
            found = replace(found, total=cap, limit=str(Path("/") / folder.relative_to(ROOT)))
        found = replace(found, available=min(found.available, room))
    return found


def shared_memory() -> int | None:
    """Return the free bytes of ``/dev/shm``, for data shared by processes; None if missing."""
    try:
        found = os.statvfs(ROOT / "dev/shm")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def huge_pages() -> bool:
    """Return True if this system backs shared memory with huge pages on request."""
    text = "".join(_lines(ROOT / "sys/kernel/mm/transparent_hugepage/shmem_enabled"))
    return any(f"[{mode}]" in text for mode in ("always", "advise", "within_size"))


def existing(folder: Path) -> Path:
    """Return ``folder`` or, if it does not exist, the nearest of its parents that exists."""
    # ``Path.exists`` would raise an error if a name were too long.
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def free_disk(folder: Path) -> int:
    """Return the free bytes of the file system on which ``folder`` is or would be created."""
    found = os.statvfs(existing(folder))
    return found.f_bavail * found.f_frsize


def require_writable(folder: Path, *, where: str, fix: str) -> None:
    """Create ``folder`` if missing, and check that it is writable.

    Raises:
        ConfigError: The folder is not writable. The error has the given ``where`` and ``fix``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"cannot write to {one_line(str(folder))}: {reason}", where=where, fix=fix
        ) from error


def in_memory(folder: Path) -> bool:
    """Return True if ``folder`` is or would be created on an in-memory file system."""
    where = existing(folder).resolve()
    kinds = {Path(mount): kind for _, mount, kind, _ in _mounts()}
    kind = next((kinds[path] for path in (where, *where.parents) if path in kinds), "")
    return kind in ("tmpfs", "ramfs")


def processor() -> str:
    """Return the processor's name according to the kernel, or the architecture if it has none."""
    for line in _lines(ROOT / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def cores() -> int:
    """Return the number of cores on which this process may run."""
    return len(os.sched_getaffinity(0))


def _cgroups() -> Iterator[Path]:
    """Yield the folders of this process's memory cgroups, from its own to the outermost visible."""
    own: dict[str, str] = {}
    for line in _lines(ROOT / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            own["cgroup"] = path
        elif number == "0":
            own["cgroup2"] = path
    for root, mount, kind, options in _mounts():
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top = ROOT / mount.lstrip("/")
        # In a container, the mount may show only the container's part of the tree.
        inside = Path(own[kind])
        folder = top / inside.relative_to(root) if inside.is_relative_to(root) else top
        if not folder.is_dir():
            folder = top
        yield folder
        yield from (parent for parent in folder.parents if parent.is_relative_to(top))


def _mounts() -> Iterator[tuple[str, str, str, str]]:
    """Yield the root, mount point, type and options of each mount (proc_pid_mountinfo(5))."""
    for line in _lines(ROOT / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        root, mount = left.split()[3:5]
        kind, _, options = right.split(maxsplit=2)
        yield root, mount.replace("\\040", " "), kind, options


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(*paths: Path) -> int | None:
    """Return the number in the first readable file, if any."""
    for path in paths:
        for line in _lines(path):
            return int(line) if line.strip().isdigit() else None
    return None


def _page_cache(folder: Path) -> int:
    """Return the bytes of a cgroup's page cache, which the kernel can reclaim."""
    entries = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
    return sum(
        int(entries.get(f"total_{name}", entries.get(name, 0)))
        for name in ("active_file", "inactive_file")
    )
