"""The page file: expert pages on disk, with parts aligned to 4096 bytes for direct reads.

This is version 1 of the format; all numbers are little-endian. The file starts with a header of
4096 bytes: ``FXMPAGES``, the version (u32), the length of the text that follows (u32), the text's
CRC-32 (u32), and the text itself: JSON with ``about`` (the contents: the codec and its options,
layers, experts and parts), ``index`` (the offset of the index) and ``index_crc``. The stored parts
follow, each padded with zeros to a multiple of 4096 bytes. The index is last. It has four u64 per
page and part: the part's offset (0: not in this file), its length as stored, the checksum of the
stored data, and the checksum of the original. docs/concepts/lossless-code.md defines the checksum.

The module ``pagewriter`` writes such files.
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
from pydantic import BaseModel, Field

from fluxmoe.errors import PageFileError
from fluxmoe.stores.reader import LENGTH, OFFSET, SECTOR, Index, PageReader, failure, sectors

MAGIC, VERSION = b"FXMPAGES", 1
PREFIX = struct.Struct("<8sIII")

#: Suffix of a file that was found to be damaged.
BAD = ".damaged"


class Head(BaseModel, strict=True, extra="forbid"):
    """The text of the header."""

    about: dict[str, Any]
    index: int = Field(ge=SECTOR, multiple_of=SECTOR, lt=2**62)
    index_crc: int


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
        PageFileError: The file is missing, incomplete or damaged, has different contents, or may be
            changed by another user.
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
        try:
            # O_NONBLOCK: opening a FIFO would wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise failure(error, path, "cannot be read") from error
        try:
            self.nbytes = self._judged_size()
            index = self._judged_index(about, pages, sizes)
        except OSError as error:
            os.close(self._fd)
            raise failure(error, path, "cannot be read") from error
        except BaseException:
            os.close(self._fd)
            raise
        fix = "start again: the file was set aside and will be rebuilt"
        super().__init__(self._fd, path, index, sizes, direct=direct, fix=fix)

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

    def set_aside(self) -> None:
        """Rename the file so that the next start builds a new one.

        Does nothing if another file has taken its name.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                os.replace(self.path, self.path.with_suffix(BAD))

    def _error(self, what: str) -> PageFileError:
        return PageFileError(what, where=str(self.path))


def _consistent(index: Index, sizes: Sequence[int], end: int) -> bool:
    """True if every page lies before ``end``, in whole sectors, with its parts side by side."""
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
