"""The function ``cached``, which checks whether a part of a file is in the page cache.

A read with ``RWF_NOWAIT`` would also show this, but the kernel would start to read absent data into
the page cache, and every cold page would be read from the disk twice.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

#: Number of the system call ``cachestat``, available since Linux 6.5.
_CACHESTAT = 451
_libc = ctypes.CDLL(None)


def cached(fd: int, offset: int, nbytes: int) -> bool:
    """Return True if the page cache holds all ``nbytes`` bytes of a file from ``offset`` on.

    Reads nothing from the disk. The result is False if the kernel does not provide the information.

    Args:
        fd: File descriptor.
        offset: A multiple of the system's page size.
        nbytes: Number of bytes, at least 1.
    """
    wanted = -(-nbytes // mmap.PAGESIZE)
    area, counts = (ctypes.c_uint64 * 2)(offset, nbytes), (ctypes.c_uint64 * 5)()
    if _libc.syscall(_CACHESTAT, fd, area, counts, 0) == 0:
        return counts[0] == wanted
    try:
        mapped = np.frombuffer(mmap.mmap(fd, nbytes, prot=mmap.PROT_READ, offset=offset), np.uint8)
    except (OSError, ValueError):
        return False
    present = np.zeros(wanted, np.uint8)
    failed = _libc.mincore(
        ctypes.c_void_p(mapped.ctypes.data),
        ctypes.c_size_t(nbytes),
        present.ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte)),
    )
    return not failed and bool((present & 1).all())
