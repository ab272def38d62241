"""Parts of pages in a file: the index, checksums, and verified reads, direct where possible.

Every part begins at a multiple of 4096 bytes, so that it can be read directly.
"""

from __future__ import annotations

import contextlib
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxmoe.core.types import Bytes
from fluxmoe.errors import PageFileError
from fluxmoe.stores.codec import kernel

SECTOR = 4096

#: Bytes from which a disk read is split, and the number of threads it is split over.
_SPLIT_FROM, _SPLIT = 1 << 20, 4

#: Columns of an index, uint64 ``[pages, parts, 4]``: offset of the part (0: not in this file), its
#: stored length, its stored checksum, and the checksum of the original.
OFFSET, LENGTH, SUM, RAW_SUM = range(4)
Index = npt.NDArray[np.uint64]


def checksum(data: Bytes) -> int:
    """Checksum of docs/concepts/code.md over whole words; remaining bytes form one more word."""
    whole = len(data) // 4
    words = data[: 4 * whole].view(np.uint32)
    total = int(kernel.checksum(words if words.flags.aligned else words.copy(), 0, whole))
    rest = int.from_bytes(data[4 * whole :].tobytes(), "little")
    return (total + (2 * whole + 1) * rest) % 2**64


def sectors(nbytes: int) -> int:
    """Round ``nbytes`` up to whole sectors."""
    return -(-nbytes // SECTOR) * SECTOR


def write(fd: int, data: Bytes, offset: int) -> None:
    """Write all of ``data`` to a file at ``offset``."""
    left = np.ascontiguousarray(data).data
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done


def failure(error: OSError, path: Path, what: str) -> PageFileError:
    """Make the error for a system call on the page file ``path`` that failed."""
    fix = {
        errno.ENOSPC: "free some space or choose a folder on another disk",
        errno.EACCES: "choose a writable folder",
        errno.EROFS: "choose a writable folder",
    }.get(error.errno or 0, "")
    return PageFileError(f"the page file {what}: {error.strerror}", where=str(path), fix=fix)


class PartReader:
    """Verified reads of parts from several threads.

    Args:
        fd: An open file, closed by ``close``.
        index: Where the parts are.
        path: The file's name, or its folder if it has none; for messages.
        direct: Read uncached parts with direct I/O.
        fix: The remedy for damage.
    """

    def __init__(self, fd: int, index: Index, path: Path, *, direct: bool, fix: str) -> None:
        self._fd, self.index, self.path, self._fix = fd, index, path, fix
        self._threads: ThreadPoolExecutor | None = None
        self._direct = -1
        if direct and hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # in-memory file systems lack direct I/O
                self._direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
                self._threads = ThreadPoolExecutor(_SPLIT - 1, "fluxmoe-read")

    def read(self, page: int, part: int, target: Bytes, scratch: Bytes) -> None:
        """Read and verify a part of a page in stored form.

        Args:
            target: Filled with the part; has its length.
            scratch: Memory aligned to 4096 bytes, with the part's length in whole sectors.

        Raises:
            PageFileError: The part cannot be read or is damaged.
        """
        offset, length, expected, _ = (int(value) for value in self.index[page, part])
        try:
            if not self._read_cached(offset, target):
                if self._direct >= 0:
                    self._read_direct(offset, scratch[: sectors(length)])
                    np.copyto(target, scratch[:length])
                else:
                    _read(self._fd, target.data, offset)
        except OSError as error:
            raise failure(error, self.path, f"cannot be read at {offset}") from error
        if checksum(target) != expected:
            raise PageFileError(
                f"part {part} of page {page} is damaged", where=str(self.path), fix=self._fix
            )

    def _read_cached(self, offset: int, target: Bytes) -> bool:
        """Read the part if it is entirely in the page cache; return True if so."""
        try:
            return os.preadv(self._fd, [target.data], offset, os.RWF_NOWAIT) == len(target)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS):
                return False
            raise

    def _read_direct(self, offset: int, scratch: Bytes) -> None:
        pieces = _SPLIT if len(scratch) >= _SPLIT_FROM else 1
        share = sectors(-(-len(scratch) // pieces))
        parts = [(scratch[i : i + share].data, offset + i)
                 for i in range(0, len(scratch), share)]  # fmt: skip
        assert self._threads is not None
        others = [self._threads.submit(_read, self._direct, *part) for part in parts[1:]]
        try:
            _read(self._direct, *parts[0])
        finally:
            errors = [other.exception() for other in others]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._threads is not None:
            self._threads.shutdown()
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


def _read(fd: int, target: memoryview, offset: int) -> None:
    while target:
        done = os.preadv(fd, [target], offset)
        if done == 0:
            raise OSError(errno.EIO, "unexpected end of file")
        target, offset = target[done:], offset + done
