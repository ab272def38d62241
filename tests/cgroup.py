"""Memory limits of control groups, for tests that start processes in them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: The hierarchies of versions 1 and 2, and the file in each that limits memory.
_ROOTS = {
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
    Path("/sys/fs/cgroup"): "memory.max",
}


@contextmanager
def limited(nbytes: int) -> Iterator[Callable[[], object]]:
    """Create a group of processes that may use ``nbytes`` of memory, page cache included.

    The group's processes are killed at the end.

    Yields:
        A function for ``preexec_fn`` that moves the calling process into the group. The test is
        skipped if the user may not create groups.
    """
    group = _make(nbytes)
    if group is None:
        pytest.skip("this user cannot limit the memory of a control group")
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        _remove(group)


def _make(nbytes: int) -> Path | None:
    for root, limit in _ROOTS.items():
        group = root / f"fluxmoe-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(nbytes))
            for swap, most in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", nbytes)):
                if (group / swap).exists():
                    (group / swap).write_text(str(most))
        except OSError:
            group.rmdir()
        else:
            return group
    return None


def _remove(group: Path, patience: float = 30.0) -> None:
    end = time.monotonic() + patience
    while True:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
            return
        except OSError:  # a killed process still has memory
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
