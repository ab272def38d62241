"""Writing of page files: a file has a temporary name until all its data is on disk.

An unfinished file is therefore never visible under the final name, and a file that is being read is
never changed. An unfinished file left by a closed store or a killed process is continued.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Bytes
from fluxmoe.errors import PageFileError
from fluxmoe.stores.disk.pagefile import (
    BAD,
    MAGIC,
    PREFIX,
    VERSION,
    Head,
    PageFile,
    data_offset,
    open_file,
    read_head,
    read_index,
)
from fluxmoe.stores.disk.reader import (
    LENGTH,
    OFFSET,
    SECTOR,
    Index,
    checksum,
    failure,
    sectors,
    write,
)

#: Suffix of an unfinished file.
PART = ".part"


class PageFileWriter:
    """Writer of a page file, which is visible at ``path`` once ``finish`` has returned.

    Attributes:
        index: Index of the appended pages, uint64 ``[pages, parts, 4]``. If an unfinished file with
            the same ``about`` was found, the index includes the file's undamaged pages.

    Raises (all methods):
        PageFileError: A system call failed, or the header is too long; no file remains.
    """

    def __init__(self, path: Path, about: dict[str, Any], pages: int, sizes: Sequence[int]) -> None:
        self._path, self._about, self._sizes, self._owner = path, about, sizes, Owner()
        self.index: Index = np.zeros((pages, len(sizes), 4), np.uint64)
        self._end = data_offset(pages, len(sizes))
        self._fd, self._part_name = -1, ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(BAD).unlink(missing_ok=True)
            if self._continue_orphan():
                return
            self._create()
        except OSError as error:
            raise self._abandon(failure(error, path, "cannot be created")) from error
        self._extend()
        self._write_head(complete=False)

    def append(self, page: int, kept: Sequence[Bytes], raw_sums: Sequence[int]) -> None:
        """Append a page.

        Args:
            page: Number of the page.
            kept: The page's parts in stored form, uint8.
            raw_sums: Checksums of the original parts.
        """
        for part, (data, total) in enumerate(zip(kept, raw_sums, strict=True)):
            self._write(data, self._end)
            self.index[page, part] = self._end, len(data), checksum(data), total
            self._end += sectors(len(data))
        self._extend()
        # After the data, so that an unfinished file contains all pages that its index lists.
        self._write(
            self.index[page].reshape(-1).view(np.uint8), SECTOR + self.index[page].nbytes * page
        )

    def finish(self, *, direct: bool) -> PageFile:
        """Write the index and the header, flush the file to disk, make it visible and open it.

        The opened file is the one written here, even if another process replaces it afterwards.
        """
        self._write(self.index.reshape(-1).view(np.uint8), SECTOR)
        try:
            os.fsync(self._fd)  # a complete header must not reach the disk before the data
            self._write_head(complete=True)
            os.fsync(self._fd)
            file = PageFile(
                Path(self._part_name), self._about, len(self.index), self._sizes, direct=direct
            )
            os.replace(self._part_name, self._path)
            os.close(self._fd)
            self._part_name, file.path = "", self._path
        except OSError as error:
            raise self._abandon(failure(error, self._path, "cannot be written")) from error
        except PageFileError:
            self.abandon()
            raise
        return file

    def abandon(self) -> None:
        """Remove the unfinished file. Idempotent; does nothing after ``finish``."""
        if self._part_name and self._owner.here:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            with contextlib.suppress(OSError):
                os.unlink(self._part_name)
            self._part_name = ""

    def suspend(self) -> None:
        """Close the unfinished file, which another writer can continue. Idempotent."""
        if self._part_name and self._owner.here:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._part_name = ""

    def _create(self) -> None:
        """Create a new unfinished file and lock it; the lock ends with this process."""
        while True:
            self._fd, self._part_name = tempfile.mkstemp(
                PART, self._path.stem + "-", self._path.parent
            )
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.fstat(self._fd).st_nlink:
                return
            os.close(self._fd)  # another process removed the file before it was locked

    def _continue_orphan(self) -> bool:
        """Open an unfinished file to continue it; remove files that cannot be continued.

        Files that other processes are writing are locked, and therefore skipped.

        Returns:
            True if a file is continued.
        """
        for orphan in self._path.parent.glob(f"{self._path.stem}-*{PART}"):
            try:
                fd = open_file(orphan, os.O_RDWR)
            except PageFileError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between the search and the lock, the file's writer may have made the file visible
                # under its final name, or removed it.
                mine = os.path.samestat(os.stat(orphan), os.fstat(fd))
                index = self._index_of(fd, orphan)
                if index is not None and mine:
                    self._fd, self._part_name = fd, str(orphan)
                    self.index = index.copy()
                    self._drop_damaged()
                    ends = index[..., OFFSET] + index[..., LENGTH]
                    self._end = max(self._end, sectors(int(ends.max(initial=0))))
                    return True
                if mine:
                    orphan.unlink(missing_ok=True)
            except OSError:
                pass
            os.close(fd)
        return False

    def _drop_damaged(self) -> None:
        """Remove pages from the index if their data did not reach the disk before a power failure.

        Raises:
            OSError: The file cannot be read.
        """
        for entry in self.index:
            if entry[0, OFFSET] and any(
                checksum(np.frombuffer(os.pread(self._fd, length, offset), np.uint8)) != total
                for offset, length, total, _ in entry.tolist()
            ):
                entry[:] = 0

    def _index_of(self, fd: int, path: Path) -> Index | None:
        """Read the index of an unfinished file; None if the file cannot be continued."""
        try:
            head = read_head(fd, path)
        except PageFileError:
            return None
        if head.about != self._about:
            return None
        return read_index(fd, len(self.index), self._sizes)

    def _write_head(self, *, complete: bool) -> None:
        crc = zlib.crc32(self.index.tobytes()) if complete else None
        text = Head(about=self._about, index_crc=crc).model_dump_json().encode()
        if PREFIX.size + len(text) > SECTOR:
            raise self._abandon(
                PageFileError(
                    f"a header of {len(text)} bytes is too long; at most {SECTOR - PREFIX.size} fit"
                )
            )
        header = PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text
        self._write(np.frombuffer(header.ljust(SECTOR, b"\0"), np.uint8), 0)

    def _extend(self) -> None:
        """Extend the file by the padding of its last part."""
        try:
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            raise self._abandon(failure(error, self._path, "cannot be written")) from error

    def _write(self, data: Bytes, offset: int) -> None:
        try:
            write(self._fd, data, offset)
        except OSError as error:
            raise self._abandon(failure(error, self._path, "cannot be written")) from error

    def _abandon(self, error: PageFileError) -> PageFileError:
        self.abandon()
        return error
