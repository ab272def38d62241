"""Detection of leaked open files, mapped frames, threads and child processes."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class LeakError(AssertionError):
    """Resources were left behind; the message lists them."""


@contextmanager
def no_leaks() -> Iterator[None]:
    """Return a context that raises LeakError if more resources exist at its end than at its start.

    Resources are open files, mappings of frames, threads and child processes of this process.
    Objects that only wait for the garbage collector do not count. This works only on Linux.
    """
    before = _held()
    yield
    left = _held() - before
    if left:
        listed = ", ".join(f"{n} x {what}" if n > 1 else what for what, n in sorted(left.items()))
        raise LeakError(f"left behind: {listed}")


def _held() -> Counter[str]:
    gc.collect()
    # The watchdog of policy calls does not count: it ends when there are no policies left.
    names = [thread.name for thread in threading.enumerate() if thread.name != "fluxmoe-watchdog"]
    held = Counter(f"thread {name}" for name in names)
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listed folder was itself open, but only while it was listed
            held[f"open file {os.readlink(f'/proc/self/fd/{entry}')}"] += 1
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/memfd:" in line:
            held["mapping of " + line.split("/memfd:", 1)[1]] += 1
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    if children.exists():
        held.update(f"child process {child}" for child in children.read_text().split())
    return held
