"""The page file: expert pages on disk, with parts aligned to 4096 bytes for direct reads.

Format, version 1, little-endian. First, a header of 4096 bytes: ``FXMPAGES``, version (u32), length
of the text that follows (u32), its CRC-32 (u32), and the text: JSON with ``about`` (the contents:
codec and its options, layers, experts, parts), ``index`` (offset of the index) and ``index_crc``.
Then the stored parts, padded with zeros to 4096 bytes. Then the index, four u64 per page and part:
offset of the part (0: not in this file), its stored length, its stored checksum, and the checksum
of the original. Checksums are those of docs/concepts/code.md.

A file is written under a temporary name and renamed once all of it is on disk, so an unfinished
file is never visible.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Bytes
from fluxmoe.errors import PageFileError
from fluxmoe.stores.parts import SECTOR, Index, PartReader, checksum, failure, sectors, write

_MAGIC, _VERSION = b"FXMPAGES", 1
_HEAD = struct.Struct("<8sIII")

#: Suffix of an unfinished file.
_PART = ".part"


class PageFileWriter:
    """Writes a page file, which is visible at ``path`` once ``finish`` returns.

    Raises (all methods):
        PageFileError: A system call failed; no file remains.
    """

    def __init__(self, path: Path, about: dict[str, Any], pages: int, parts: int) -> None:
        self._path, self._about, self._owner = path, about, Owner()
        self._index: Index = np.zeros((pages, parts, 4), np.uint64)
        self._end = SECTOR
        self._part_name = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_orphans(path)
            self._fd, self._part_name = tempfile.mkstemp(_PART, path.stem + "-", path.parent)
            fcntl.flock(self._fd, fcntl.LOCK_EX)  # released however this process ends
        except OSError as error:
            raise failure(error, path, "cannot be created") from error

    def append(self, page: int, part: int, kept: Bytes, raw_sum: int) -> None:
        """Append a page's part in stored form."""
        self._write(kept, self._end)
        self._index[page, part] = self._end, len(kept), checksum(kept), raw_sum
        self._end += sectors(len(kept))

    def finish(self) -> None:
        """Write index and header, and flush the file to disk."""
        index = self._index.reshape(-1).view(np.uint8)
        self._write(index, self._end)
        head = {"about": self._about, "index": self._end, "index_crc": zlib.crc32(index.data)}
        text = json.dumps(head).encode()
        if _HEAD.size + len(text) > SECTOR:
            raise self._abandon(PageFileError(f"a header of {len(text)} bytes is too long"))
        header = _HEAD.pack(_MAGIC, _VERSION, len(text), zlib.crc32(text)) + text
        self._write(np.frombuffer(header, np.uint8), 0)
        try:
            os.ftruncate(self._fd, sectors(self._end + index.nbytes))
            os.fsync(self._fd)
            os.close(self._fd)
            os.replace(self._part_name, self._path)
            self._part_name = ""
        except OSError as error:
            raise self._abandon(failure(error, self._path, "cannot be written")) from error

    def abandon(self) -> None:
        """Remove the unfinished file. Idempotent; does nothing after ``finish``."""
        if self._part_name and self._owner.here:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            with contextlib.suppress(OSError):
                os.unlink(self._part_name)
            self._part_name = ""

    def _write(self, data: Bytes, offset: int) -> None:
        try:
            write(self._fd, data, offset)
        except OSError as error:
            raise self._abandon(failure(error, self._path, "cannot be written")) from error

    def _abandon(self, error: PageFileError) -> PageFileError:
        self.abandon()
        return error


def _remove_orphans(path: Path) -> None:
    """Remove unfinished files for ``path`` left by killed processes."""
    for orphan in path.parent.glob(f"{path.stem}-*{_PART}"):
        with contextlib.suppress(OSError), orphan.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphan.unlink()


class PageFile(PartReader):
    """A complete page file, open for reading from several threads.

    Args:
        path: The file.
        about: The expected description of the contents.
        direct: Read uncached parts with direct I/O.

    Raises:
        PageFileError: The file is missing or incomplete, or has different contents.
    """

    def __init__(
        self, path: Path, about: dict[str, Any], pages: int, parts: int, *, direct: bool = True
    ) -> None:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise failure(error, path, "cannot be read") from error
        try:
            index = _checked_index(fd, path, about, pages, parts)
        except OSError as error:
            os.close(fd)
            raise failure(error, path, "cannot be read") from error
        except BaseException:
            os.close(fd)
            raise
        fix = "delete the file; the next start rebuilds it"
        super().__init__(fd, index, path, direct=direct, fix=fix)


def _checked_index(fd: int, path: Path, about: dict[str, Any], pages: int, parts: int) -> Index:
    header = os.pread(fd, SECTOR, 0)
    if len(header) < SECTOR or header[: len(_MAGIC)] != _MAGIC:
        raise PageFileError("not a page file", where=str(path))
    _, version, length, crc = _HEAD.unpack_from(header)
    if version != _VERSION:
        raise PageFileError(f"unsupported version {version}", where=str(path))
    text = header[_HEAD.size : _HEAD.size + length]
    if zlib.crc32(text) != crc:
        raise PageFileError("the header is damaged", where=str(path))
    head = json.loads(text)
    if head["about"] != about:
        raise PageFileError("the layout, codec or options differ", where=str(path))
    nbytes = pages * parts * 4 * 8
    if os.fstat(fd).st_size != sectors(head["index"] + nbytes):
        raise PageFileError("the file is truncated or too long", where=str(path))
    raw = os.pread(fd, nbytes, head["index"])
    if zlib.crc32(raw) != head["index_crc"]:
        raise PageFileError("the index is damaged", where=str(path))
    return np.frombuffer(raw, np.uint64).reshape(pages, parts, 4)
