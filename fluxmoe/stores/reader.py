"""Pages in a file: the index, checksums, and reads of whole pages, with direct I/O if possible.

The parts of a page are adjacent, and each begins at a multiple of 4096 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxmoe.core.types import Bytes
from fluxmoe.errors import PageFileError
from fluxmoe.stores import residency
from fluxmoe.stores.codec import kernel

SECTOR = 4096

#: Maximum number of pieces of memory in one system call (IOV_MAX).
_VECTORS = 1024

#: Columns of the index.
OFFSET, LENGTH, SUM, RAW_SUM = range(4)
Index = npt.NDArray[np.uint64]


def checksum(data: Bytes) -> int:
    """Compute the checksum that docs/concepts/lossless-code.md defines.

    If the last word is incomplete, it is padded with zeros.
    """
    whole = len(data) // 4
    words = data[: 4 * whole].view(np.uint32)
    total = int(kernel.checksum(words if words.flags.aligned else words.copy(), 0, whole))
    rest = int.from_bytes(data[4 * whole :].tobytes(), "little")
    return (total + (2 * whole + 1) * rest) % 2**64


def sectors(nbytes: int) -> int:
    """Round ``nbytes`` up to whole sectors."""
    return -(-nbytes // SECTOR) * SECTOR


class Scratch(threading.local):
    """Memory that each thread has for itself, uint8 ``[nbytes]``, aligned to sectors."""

    def __init__(self, nbytes: int) -> None:
        self.memory: Bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


class DamagedPageError(PageFileError):
    """A page's bytes do not match the page's checksums."""


class PageReader:
    """Reader of pages from an open file; several threads can use it at once.

    Args:
        fd: The file, closed by ``close``.
        path: The file's name, or its folder if it has no name; for messages.
        index: The offset, the length and the checksums of each part.
        sizes: Bytes of each part before encoding.
        direct: Read pages that are not in the page cache with direct I/O.
        fix: The remedy for damage, for messages.

    Attributes:
        verified: True for pages whose checksums need no further check, bool ``[pages]``; set by
            the caller.
    """

    def __init__(
        self, fd: int, path: Path, index: Index, sizes: Sequence[int], *, direct: bool, fix: str
    ) -> None:
        self._fd, self.path, self.index, self._fix = fd, path, index, fix
        self._direct = -1
        if direct and hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # in-memory file systems lack direct I/O
                self._direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
        self.verified = np.zeros(len(index), bool)
        self._scratch = Scratch(SECTOR + sum(map(sectors, sizes)))

    def read(self, page: int, targets: Sequence[Bytes]) -> None:
        """Read a page's parts in stored form, in one system call.

        The checksums are verified unless the page is marked in ``verified``.

        Args:
            targets: For each part, memory of its stored length. With direct I/O, the disk writes
                directly to memory that is aligned to 4096 bytes; other memory costs a copy.

        Raises:
            DamagedPageError: The page is damaged.
            PageFileError: The page cannot be read.
        """
        entry = self.index[page]
        offset = int(entry[0, OFFSET])
        nbytes = sum(sectors(len(target)) for target in targets)
        direct = self._direct >= 0 and not residency.cached(self._fd, offset, nbytes)
        pieces, copies = _pieces(targets, self._scratch.memory, aligned=direct)
        try:
            _read(self._direct if direct else self._fd, pieces, offset)
        except OSError as error:
            raise failure(error, self.path, f"cannot be read at {offset}") from error
        for target, kept in copies:
            np.copyto(target, kept)
        if self.verified[page]:
            return
        for part, target in enumerate(targets):
            if checksum(target) != int(entry[part, SUM]):
                raise DamagedPageError(
                    f"part {part} of page {page} is damaged",
                    where=str(self.path),
                    fix=self._fix,
                )

    def set_aside(self) -> None:
        """Keep the next start from using a damaged file; does nothing for a file without a name."""

    def close(self) -> None:
        """Close the file. Idempotent."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


def _pieces(
    targets: Sequence[Bytes], scratch: Bytes, *, aligned: bool
) -> tuple[list[memoryview], list[tuple[Bytes, Bytes]]]:
    """Choose the memory that receives a page's sectors, in order.

    Returns:
        The pieces of memory, and the copies ``(to, from)`` to make after the read.

    Args:
        targets: Destinations of the parts.
        scratch: Memory for padding and for parts that cannot be read into their destination.
        aligned: Let all pieces begin and end at multiples of a sector, as direct I/O requires.
    """
    padding, scratch = scratch[:SECTOR], scratch[SECTOR:]
    pieces, copies = [], []
    for target in targets:
        rest = sectors(len(target)) - len(target)
        if not aligned:
            pieces += [target.data, padding[:rest].data]
            continue
        whole = 0 if target.ctypes.data % SECTOR else len(target) // SECTOR * SECTOR
        last, scratch = np.split(scratch, [sectors(len(target) - whole)])
        pieces += [target[:whole].data, last.data]
        copies.append((target[whole:], last[: len(target) - whole]))
    return [piece for piece in pieces if len(piece)], copies


def _read(fd: int, pieces: list[memoryview], offset: int) -> None:
    while pieces:
        done = os.preadv(fd, pieces[:_VECTORS], offset)
        if done == 0:
            raise OSError(errno.EIO, "unexpected end of file")
        offset += done
        while pieces and done >= len(pieces[0]):
            done -= len(pieces.pop(0))
        if done:
            pieces[0] = pieces[0][done:]


def write(fd: int, data: Bytes, offset: int) -> None:
    """Write all of ``data`` to a file at ``offset``."""
    left = np.ascontiguousarray(data).data
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done


def failure(error: OSError, path: Path, what: str) -> PageFileError:
    """Make the error for a failed system call on a page file; ``what`` describes the failure."""
    fix = {
        errno.ENOSPC: "free some space or choose a folder on another disk",
        errno.EACCES: "choose a writable folder",
        errno.EROFS: "choose a writable folder",
    }.get(error.errno or 0, "")
    return PageFileError(f"the page file {what}: {error.strerror}", where=str(path), fix=fix)
