"""The page file: expert pages on disk, with parts aligned to 4096 bytes for direct reads.

Format, version 1, little-endian. First, a header of 4096 bytes: ``FXMPAGES``, version (u32), length
of the text that follows (u32), its CRC-32 (u32), and the text: JSON with ``about`` (the contents:
codec and its options, layers, experts, parts), ``index`` (offset of the index) and ``index_crc``.
Then the stored parts, padded with zeros to 4096 bytes. Then the index, four u64 per page and part:
offset of the part (0: not in this file), its stored length, its stored checksum, and the checksum
of the original. Checksums are those of docs/concepts/lossless-code.md.

``pagewriter`` writes the files.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from fluxmoe.core.types import Bytes
from fluxmoe.errors import PageFileError
from fluxmoe.stores import residency
from fluxmoe.stores.codec import kernel

SECTOR = 4096
MAGIC, VERSION = b"FXMPAGES", 1
PREFIX = struct.Struct("<8sIII")

#: Suffix of a file in which damage was found.
BAD = ".damaged"
#: Most pieces of memory in one system call (IOV_MAX).
_VECTORS = 1024

#: Columns of the index.
OFFSET, LENGTH, SUM, RAW_SUM = range(4)
Index = npt.NDArray[np.uint64]


def checksum(data: Bytes) -> int:
    """Checksum (docs/concepts/lossless-code.md) over whole words; remaining bytes form one more."""
    whole = len(data) // 4
    words = data[: 4 * whole].view(np.uint32)
    total = int(kernel.checksum(words if words.flags.aligned else words.copy(), 0, whole))
    rest = int.from_bytes(data[4 * whole :].tobytes(), "little")
    return (total + (2 * whole + 1) * rest) % 2**64


def sectors(nbytes: int) -> int:
    """Round ``nbytes`` up to whole sectors."""
    return -(-nbytes // SECTOR) * SECTOR


class Scratch(threading.local):
    """Memory of each thread that uses it, uint8 ``[nbytes]``, aligned to sectors."""

    def __init__(self, nbytes: int) -> None:
        self.memory: Bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


class DamagedPageError(PageFileError):
    """A page's bytes differ from its checksum."""


class Head(BaseModel, strict=True, extra="forbid"):
    """The text of the header."""

    about: dict[str, Any]
    index: int = Field(ge=SECTOR, multiple_of=SECTOR, lt=2**62)
    index_crc: int


class PageFile:
    """A complete page file, open for reading from several threads.

    Whatever the file says is judged here, so that later reads rely on it.

    Args:
        path: The file.
        about: The expected description of the contents.
        sizes: Bytes of each part before encoding.
        direct: Read pages that are not in the page cache with direct I/O.

    Raises:
        PageFileError: The file is missing, incomplete or damaged, has different contents, or may be
            changed by another user.

    Attributes:
        verified: Pages whose checksums need no further check, bool ``[pages]``; set by the caller.
    """

    def __init__(
        self,
        path: Path,
        about: dict[str, Any],
        pages: int,
        sizes: Sequence[int],
        *,
        direct: bool = True,
    ) -> None:
        self.path = path
        self._direct = -1
        try:
            # O_NONBLOCK: opening a FIFO would wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise failure(error, path, "cannot be read") from error
        try:
            self.nbytes = self._judged_size()
            self.index = self._judged_index(about, pages, sizes)
            if direct and hasattr(os, "O_DIRECT"):
                with contextlib.suppress(OSError):  # in-memory file systems lack direct I/O
                    self._direct = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            self.close()
            raise failure(error, path, "cannot be read") from error
        except BaseException:
            self.close()
            raise
        self.verified = np.zeros(pages, bool)
        self._scratch = Scratch(SECTOR + sum(map(sectors, sizes)))

    def _judged_size(self) -> int:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._error("not a regular file")
        if status.st_uid not in (os.geteuid(), 0):
            raise self._error(f"the file belongs to user {status.st_uid}")
        return status.st_size

    def _judged_index(self, about: dict[str, Any], pages: int, sizes: Sequence[int]) -> Index:
        header = os.pread(self._fd, SECTOR, 0)
        if len(header) < SECTOR or header[: len(MAGIC)] != MAGIC:
            raise self._error("not a page file")
        _, version, length, crc = PREFIX.unpack_from(header)
        if version != VERSION:
            raise self._error(f"unsupported version {version}")
        text = header[PREFIX.size : PREFIX.size + length]
        try:
            head = Head.model_validate_json(text)
        except ValueError:
            head = None
        if zlib.crc32(text) != crc or head is None:
            raise self._error("the header is damaged")
        if head.about != about:
            raise self._error("the layout, codec or options differ")
        nbytes = pages * len(sizes) * 4 * 8
        if self.nbytes != sectors(head.index + nbytes):
            raise self._error("the file is truncated or too long")
        raw = os.pread(self._fd, nbytes, head.index)
        index = np.frombuffer(raw, np.uint64).reshape(pages, len(sizes), 4)
        if zlib.crc32(raw) != head.index_crc or not _consistent(index, sizes, head.index):
            raise self._error("the index is damaged")
        return index

    def read(self, page: int, targets: Sequence[Bytes]) -> None:
        """Read a page's parts in stored form, in one system call.

        The checksums are verified unless ``verified``.

        Args:
            targets: Per part, memory of its stored length. Memory aligned to 4096 bytes is written
                by the disk itself; other memory costs a copy.

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
                    fix="start again: the file was set aside and will be rebuilt",
                )

    def set_aside(self) -> None:
        """Rename the file, unless another has its name now, so that the next start builds one."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                os.replace(self.path, self.path.with_suffix(BAD))

    def _error(self, what: str) -> PageFileError:
        return PageFileError(what, where=str(self.path))

    def close(self) -> None:
        """Close the file. Idempotent."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


def _consistent(index: Index, sizes: Sequence[int], end: int) -> bool:
    """True if the pages lie within the file, each in whole sectors with its parts side by side."""
    offsets, lengths = index[..., OFFSET], index[..., LENGTH]
    there = offsets[:, 0] != 0
    if index[~there].any() or (offsets > end).any() or (lengths > np.array(sizes, np.uint64)).any():
        return False
    room = -(-lengths.astype(np.int64) // SECTOR) * SECTOR
    ends = offsets.astype(np.int64) + room
    return bool(
        (lengths[there] > 0).all()
        and (offsets % SECTOR == 0).all()
        and (ends[:, :-1] == offsets[:, 1:].astype(np.int64))[there].all()
        and (ends <= end).all()
    )


def _pieces(
    targets: Sequence[Bytes], scratch: Bytes, *, aligned: bool
) -> tuple[list[memoryview], list[tuple[Bytes, Bytes]]]:
    """Memory that receives a page's sectors in order, and copies ``(to, from)`` to make afterwards.

    Args:
        targets: Destinations of the parts.
        scratch: Memory for padding and for parts that cannot be read into their destination.
        aligned: Pieces must begin and end at sectors, as direct I/O demands.
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


def failure(error: OSError, path: Path, what: str) -> PageFileError:
    """Describe a failed system call on a page file: ``what`` failed, and the way out."""
    fix = {
        errno.ENOSPC: "free some space or choose a folder on another disk",
        errno.EACCES: "choose a writable folder",
        errno.EROFS: "choose a writable folder",
    }.get(error.errno or 0, "")
    return PageFileError(f"the page file {what}: {error.strerror}", where=str(path), fix=fix)
