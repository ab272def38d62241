"""Pages in a file: the index, checksums, and reads of whole pages, with direct I/O if possible.

The parts of a page are adjacent, and each begins at a multiple of 4096 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Bytes
from fluxmoe.errors import PageFileError
from fluxmoe.stores.codec import kernel
from fluxmoe.stores.disk import residency

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
    """Separate memory for each thread, uint8 ``[nbytes]``, aligned to sectors."""

    def __init__(self, nbytes: int) -> None:
        self.memory: Bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


class DamagedPageError(PageFileError):
    """A page's bytes do not match the page's checksums."""


class DiskMeter:
    """Meter of the reads of several threads from a disk.

    Attributes:
        nbytes: Number of bytes read.
        seconds: Time during which at least one read was in progress.
    """

    def __init__(self) -> None:
        # A forked child must not wait for a lock that a thread of the parent process holds.
        self._owner, self._lock = Owner(), threading.Lock()
        self._reads: set[object] = set()
        self._since = 0.0
        self.reset()

    def reset(self) -> None:
        """Set the counters to zero."""
        self.nbytes, self.seconds = 0, 0.0

    @contextmanager
    def reading(self, nbytes: int) -> Iterator[None]:
        """Measure a read of ``nbytes`` bytes."""
        if not self._owner.here:
            yield
            return
        read = object()
        try:
            with self._lock:
                if not self._reads:
                    self._since = time.perf_counter()
                self._reads.add(read)
            yield
        finally:
            with self._lock:
                self._reads.discard(read)
                self.nbytes += nbytes
                if not self._reads:
                    self.seconds += time.perf_counter() - self._since


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
        meter: Measures reads of pages that were not in the page cache.
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
        self.meter = DiskMeter()
        self._scratch = Scratch(SECTOR + sum(map(sectors, sizes)))

    @property
    def direct(self) -> bool:
        """True if pages that are not in the page cache are read with direct I/O."""
        return self._direct >= 0

    def cached(self, page: int) -> bool:
        """Return True if a page is in the page cache; reading the page is then only a copy."""
        return residency.cached(self._fd, *self._span(page))

    def _span(self, page: int) -> tuple[int, int]:
        """Return a page's offset in the file, and the size of its sectors, both in bytes."""
        entry = self.index[page].tolist()
        return entry[0][OFFSET], sum(sectors(part[LENGTH]) for part in entry)

    def read(self, page: int, targets: Sequence[Bytes]) -> None:
        """Read a page and verify its checksums. See ``fetch`` and ``verify``."""
        self.fetch(page, targets)
        self.verify(page, targets)

    def fetch(self, page: int, targets: Sequence[Bytes]) -> None:
        """Read a page's parts in stored form, usually in one system call.

        Args:
            targets: For each part, memory of its stored length. With direct I/O, the disk writes
                directly to memory that is aligned to 4096 bytes; other memory costs a copy.

        Raises:
            PageFileError: The page cannot be read.
        """
        offset, nbytes = self._span(page)
        cached = residency.cached(self._fd, offset, nbytes)
        direct = self.direct and not cached
        pieces, copies = _pieces(targets, self._scratch.memory, aligned=direct)
        try:
            with contextlib.nullcontext() if cached else self.meter.reading(nbytes):
                _read(self._direct if direct else self._fd, pieces, offset)
        except OSError as error:
            raise failure(error, self.path, f"cannot be read at {offset}") from error
        for target, kept in copies:
            np.copyto(target, kept)

    def verify(self, page: int, targets: Sequence[Bytes]) -> None:
        """Verify the checksums of a page in stored form unless it is marked in ``verified``.

        Raises:
            DamagedPageError: The page is damaged.
        """
        if self.verified[page]:
            return
        for part, target in enumerate(targets):
            if checksum(target) != int(self.index[page, part, SUM]):
                raise DamagedPageError(
                    f"part {part} of page {page} is damaged",
                    where=str(self.path),
                    fix=self._fix,
                )

    def probe(self, page: int, room: Bytes) -> int:
        """Read the beginning of a page with direct I/O, up to the size of ``room``.

        Args:
            page: Number of a page in the file.
            room: Memory for whole sectors, aligned to 4096 bytes; uint8 ``[nbytes]``.

        Returns:
            The number of bytes that were read.

        Raises:
            OSError: The read failed.
        """
        return os.preadv(self._direct, [room.data], int(self.index[page, 0, OFFSET]))

    def set_aside(self) -> None:
        """Prevent later starts from using a damaged file. Does nothing for an unnamed file."""

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

    Args:
        targets: Destinations of the parts.
        scratch: Memory for padding and for data that cannot be read into its destination.
        aligned: Make all pieces begin and end at multiples of a sector, as direct I/O requires.

    Returns:
        The pieces of memory, and the copies ``(to, from)`` to make after the read.
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
    """Write all of ``data`` to a file at ``offset``.

    Raises:
        OSError: The data cannot be written.
    """
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
