"""The page file: expert pages on disk, with parts aligned to 4096 bytes for direct reads.

This is version 2 of the format; all numbers are little-endian. The file starts with a header of
4096 bytes: ``FXMPAGES``, the version (u32), the length of the text that follows (u32), the text's
CRC-32 (u32), and the text itself: JSON with ``about`` (the contents: the key of the weights, the
codec and its options, layers, experts, parts and limits) and ``index_crc`` (null: the file is
incomplete). The index follows, padded with zeros to a multiple of 4096 bytes, and then the stored
parts, each padded in the same way. The index has four u64 per page and part: the part's offset (0:
not in this file), its length as stored, the checksum of the stored data, and the checksum of the
original. docs/concepts/lossless-code.md defines the checksum.

The module ``pagewriter`` writes such files, and continues incomplete ones.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from fluxmoe.errors import PageFileError
from fluxmoe.stores.disk.reader import LENGTH, OFFSET, SECTOR, Index, PageReader, failure, sectors

MAGIC, VERSION = b"FXMPAGES", 2
PREFIX = struct.Struct("<8sIII")

#: Bytes of an entry of the index.
_ENTRY = 4 * 8

#: Suffix of a file that was found to be damaged.
BAD = ".damaged"


class Head(BaseModel, strict=True, extra="forbid"):
    """The text of the header."""

    about: dict[str, Any]
    index_crc: int | None


def open_file(path: Path, flags: int) -> int:
    """Open a file that may be a page file: a regular file that belongs to this user or to root.

    Args:
        path: Path of the file.
        flags: ``os.O_RDONLY`` or ``os.O_RDWR``.

    Returns:
        The file descriptor.

    Raises:
        PageFileError: The file is not regular, belongs to another user, or cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise failure(error, path, "cannot be read") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        what = "not a regular file"
    elif status.st_uid not in (os.geteuid(), 0):
        what = f"the file belongs to user {status.st_uid}"
    else:
        return fd
    os.close(fd)
    raise PageFileError(what, where=str(path))


def read_head(fd: int, path: Path) -> Head:
    """Read the header of a page file.

    Raises:
        PageFileError: The file is not a page file of this version, or its header is damaged.
        OSError: The file cannot be read.
    """
    header = os.pread(fd, SECTOR, 0)
    if len(header) < SECTOR or header[: len(MAGIC)] != MAGIC:
        raise PageFileError("not a page file", where=str(path))
    _, version, length, crc = PREFIX.unpack_from(header)
    if version != VERSION:
        raise PageFileError(f"unsupported version {version}", where=str(path))
    text = header[PREFIX.size : PREFIX.size + length]
    try:
        head = Head.model_validate_json(text)
    except ValueError:
        head = None
    if zlib.crc32(text) != crc or head is None:
        raise PageFileError("the header is damaged", where=str(path))
    return head


def read_index(fd: int, pages: int, sizes: Sequence[int]) -> Index | None:
    """Read the index of a page file.

    Args:
        fd: File descriptor of the page file.
        pages: Number of pages of the model.
        sizes: Bytes of each part before encoding.

    Returns:
        The index, uint64 ``[pages, parts, 4]``; None if the index is not consistent with itself or
        with the file's size.

    Raises:
        OSError: The file cannot be read.
    """
    begin, end = data_offset(pages, len(sizes)), os.fstat(fd).st_size
    if pages < 1 or not sizes or not 0 < min(sizes) <= max(sizes) < 1 << 63 or begin > end:
        return None
    raw = os.pread(fd, pages * len(sizes) * _ENTRY, SECTOR)
    index = np.frombuffer(raw, np.uint64).reshape(pages, len(sizes), 4)
    return index if _consistent(index, sizes, begin, end) else None


def data_offset(pages: int, parts: int) -> int:
    """Return the offset of the first stored part in bytes."""
    return SECTOR + sectors(pages * parts * _ENTRY)


class PageFile(PageReader):
    """A complete page file, open for reading from several threads.

    The constructor validates the header and the index, so that later reads can rely on them.

    Args:
        path: The file.
        about: The expected description of the contents.
        pages: Number of pages of the model.
        sizes: Bytes of each part before encoding.
        direct: Read pages that are not in the page cache with direct I/O.

    Raises:
        PageFileError: The file is missing, incomplete or damaged, is not a regular file, has
            different contents, or belongs to another user.
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
        self.path, self._fd = path, open_file(path, os.O_RDONLY)
        try:
            self.nbytes = os.fstat(self._fd).st_size
            index = self._judged_index(about, pages, sizes)
        except OSError as error:
            os.close(self._fd)
            raise failure(error, path, "cannot be read") from error
        except BaseException:
            os.close(self._fd)
            raise
        fix = "start again: the file was set aside and will be rebuilt"
        super().__init__(self._fd, path, index, sizes, direct=direct, fix=fix)

    def _judged_index(self, about: dict[str, Any], pages: int, sizes: Sequence[int]) -> Index:
        head = read_head(self._fd, self.path)
        if head.about != about:
            raise self._error("the weights, layout, codec or options differ")
        if head.index_crc is None:
            raise self._error("the file is incomplete")
        index = read_index(self._fd, pages, sizes)
        if index is None or zlib.crc32(index.tobytes()) != head.index_crc:
            raise self._error("the index is damaged, or the file is truncated")
        return index

    def set_aside(self) -> None:
        """Rename the file so that the next start builds a new one.

        Does nothing if another file has taken its name.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                os.replace(self.path, self.path.with_suffix(BAD))

    def _error(self, what: str) -> PageFileError:
        return PageFileError(what, where=str(self.path))


def _consistent(index: Index, sizes: Sequence[int], begin: int, end: int) -> bool:
    """Return True if all pages are in ``begin … end``, with aligned and adjacent parts."""
    offsets, lengths = index[..., OFFSET], index[..., LENGTH]
    there = offsets[:, 0] != 0
    if index[~there].any() or (offsets > end).any() or (lengths > np.array(sizes, np.uint64)).any():
        return False
    room = -(-lengths.astype(np.int64) // SECTOR) * SECTOR
    ends = offsets.astype(np.int64) + room
    return bool(
        (lengths[there] > 0).all()
        and (offsets[there] >= begin).all()
        and (offsets % SECTOR == 0).all()
        and (ends[:, :-1] == offsets[:, 1:].astype(np.int64))[there].all()
        and (ends <= end).all()
    )
