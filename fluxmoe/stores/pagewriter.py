"""Writing of page files: a file has a temporary name until all its data is on the disk.

So an unfinished file is never visible under the final name, and a file that is being read is never
changed.
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
from fluxmoe.stores.pagefile import BAD, MAGIC, PREFIX, VERSION, Head, PageFile
from fluxmoe.stores.reader import SECTOR, Index, checksum, failure, sectors, write

#: Suffix of an unfinished file.
_PART = ".part"


class PageFileWriter:
    """Writer of a page file, which is visible at ``path`` once ``finish`` has returned.

    Raises (all methods):
        PageFileError: A system call failed; no file remains.
    """

    def __init__(self, path: Path, about: dict[str, Any], pages: int, sizes: Sequence[int]) -> None:
        self._path, self._about, self._sizes, self._owner = path, about, sizes, Owner()
        self._index: Index = np.zeros((pages, len(sizes), 4), np.uint64)
        self._end = SECTOR
        self._part_name = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            self._fd, self._part_name = tempfile.mkstemp(_PART, path.stem + "-", path.parent)
            fcntl.flock(self._fd, fcntl.LOCK_EX)  # released however this process ends
        except OSError as error:
            raise failure(error, path, "cannot be created") from error

    def append(self, page: int, part: int, kept: Bytes, raw_sum: int) -> None:
        """Append a page's part in stored form."""
        self._write(kept, self._end)
        self._index[page, part] = self._end, len(kept), checksum(kept), raw_sum
        self._end += sectors(len(kept))

    def finish(self, *, direct: bool) -> PageFile:
        """Write the index and the header, flush the file to disk, make it visible and open it.

        The opened file is the one written here, even if another process has replaced it meanwhile.
        """
        index = self._index.reshape(-1).view(np.uint8)
        self._write(index, self._end)
        head = Head(about=self._about, index=self._end, index_crc=zlib.crc32(index.data))
        text = head.model_dump_json().encode()
        if PREFIX.size + len(text) > SECTOR:
            raise self._abandon(PageFileError(f"a header of {len(text)} bytes is too long"))
        header = PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text
        self._write(np.frombuffer(header, np.uint8), 0)
        try:
            os.ftruncate(self._fd, sectors(self._end + index.nbytes))
            os.fsync(self._fd)
            file = PageFile(
                Path(self._part_name), self._about, len(self._index), self._sizes, direct=direct
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

    def _write(self, data: Bytes, offset: int) -> None:
        try:
            write(self._fd, data, offset)
        except OSError as error:
            raise self._abandon(failure(error, self._path, "cannot be written")) from error

    def _abandon(self, error: PageFileError) -> PageFileError:
        self.abandon()
        return error


def _remove_leftovers(path: Path) -> None:
    """Remove a damaged file of this name, and unfinished files that killed processes left."""
    path.with_suffix(BAD).unlink(missing_ok=True)
    for orphan in path.parent.glob(f"{path.stem}-*{_PART}"):
        with contextlib.suppress(OSError), orphan.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphan.unlink()
