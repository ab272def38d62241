"""Two ways to fork: Python's, and one that bypasses Python."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable

_fork: Callable[[], int] = ctypes.PyDLL(None).fork


def c_fork() -> int:
    """Fork as a C library would, without Python's hooks for it.

    The child has no other threads. If another thread had requested the GIL before the fork, the
    child would hand the GIL over and wait forever, so no other thread may request it meanwhile.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    time.sleep(0.02)  # threads that already wait go first
    pid = _fork()
    sys.setswitchinterval(interval)
    return pid


FORKS: dict[str, Callable[[], int]] = {"python": os.fork, "c": c_fork}
