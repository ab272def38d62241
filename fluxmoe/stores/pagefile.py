"""The page file: expert pages on disk, with parts aligned to 4096 bytes for direct reads.

Format, version 1, little-endian. First, a header of 4096 bytes: ``FXMPAGES``, version (u32), length
of the text that follows (u32), its CRC-32 (u32), and the text: JSON with ``about`` (the contents:
codec and its options, layers, experts, parts), ``index`` (offset of the index) and ``index_crc``.
Then the stored parts, padded with zeros to 4096 bytes. Then the index, four u64 per page and part:
offset of the part (0: not in this file), its stored length, its stored checksum, and the checksum
of the original. Checksums are those of docs/concepts/lossless-code.md.

A file is written under a temporary name and renamed once all of it is on disk, so an unfinished
file is never visible.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Bytes
from fluxmoe.errors import PageFileError
from fluxmoe.stores.codec import kernel

SECTOR = 4096
_MAGIC, _VERSION = b"FXMPAGES", 1
_HEAD = struct.Struct("<8sIII")

#: Bytes from which a disk read is split, and the number of threads it is split over.
_SPLIT_FROM, _SPLIT = 1 << 20, 4

#: Suffix of an unfinished file.
_PART = ".part"

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
            raise _failure(error, path, "cannot be created") from error

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
            raise self._abandon(_failure(error, self._path, "cannot be written")) from error

    def abandon(self) -> None:
        """Remove the unfinished file. Idempotent; does nothing after ``finish``."""
        if self._part_name and self._owner.here:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            with contextlib.suppress(OSError):
                os.unlink(self._part_name)
            self._part_name = ""

    def _write(self, data: Bytes, offset: int) -> None:
        left = np.ascontiguousarray(data).data
        try:
            while left:
                done = os.pwrite(self._fd, left, offset)
                left, offset = left[done:], offset + done
        except OSError as error:
            raise self._abandon(_failure(error, self._path, "cannot be written")) from error

    def _abandon(self, error: PageFileError) -> PageFileError:
        self.abandon()
        return error


def _remove_orphans(path: Path) -> None:
    """Remove unfinished files for ``path`` left by killed processes."""
    for orphan in path.parent.glob(f"{path.stem}-*{_PART}"):
        with contextlib.suppress(OSError), orphan.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphan.unlink()


class PageFile:
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
        self.path = path
        self._threads: ThreadPoolExecutor | None = None
        self._direct = -1
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _failure(error, path, "cannot be read") from error
        try:
            self.nbytes = os.fstat(self._fd).st_size
            self.index = self._checked_index(about, pages, parts)
            if direct and hasattr(os, "O_DIRECT"):
                with contextlib.suppress(OSError):  # in-memory file systems lack direct I/O
                    self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            self.close()
            raise _failure(error, path, "cannot be read") from error
        except BaseException:
            self.close()
            raise
        if self._direct >= 0:
            self._threads = ThreadPoolExecutor(_SPLIT - 1, "fluxmoe-read")

    def _checked_index(self, about: dict[str, Any], pages: int, parts: int) -> Index:
        header = os.pread(self._fd, SECTOR, 0)
        if len(header) < SECTOR or header[: len(_MAGIC)] != _MAGIC:
            raise PageFileError("not a page file", where=str(self.path))
        _, version, length, crc = _HEAD.unpack_from(header)
        if version != _VERSION:
            raise PageFileError(f"unsupported version {version}", where=str(self.path))
        text = header[_HEAD.size : _HEAD.size + length]
        if zlib.crc32(text) != crc:
            raise PageFileError("the header is damaged", where=str(self.path))
        head = json.loads(text)
        if head["about"] != about:
            raise PageFileError("the layout, codec or options differ", where=str(self.path))
        nbytes = pages * parts * 4 * 8
        if self.nbytes != sectors(head["index"] + nbytes):
            raise PageFileError("the file is truncated or too long", where=str(self.path))
        raw = os.pread(self._fd, nbytes, head["index"])
        if zlib.crc32(raw) != head["index_crc"]:
            raise PageFileError("the index is damaged", where=str(self.path))
        return np.frombuffer(raw, np.uint64).reshape(pages, parts, 4)

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
            raise _failure(error, self.path, f"cannot be read at {offset}") from error
        if checksum(target) != expected:
            raise PageFileError(
                f"part {part} of page {page} is damaged",
                where=str(self.path),
                fix="delete the file; the next start rebuilds it",
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


def _failure(error: OSError, path: Path, what: str) -> PageFileError:
    fix = {
        errno.ENOSPC: "free some space or choose a folder on another disk",
        errno.EACCES: "choose a writable folder",
        errno.EROFS: "choose a writable folder",
    }.get(error.errno or 0, "")
    return PageFileError(f"the page file {what}: {error.strerror}", where=str(path), fix=fix)
