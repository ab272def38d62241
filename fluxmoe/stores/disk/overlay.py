"""Replaced pages of a page file, in an unnamed file that disappears when this process ends.

A page file belongs to its checkpoint and may be read by other processes, so it is never changed.
A page has two places in the overlay, each large enough for the uncoded page. New contents go to the
place that is not in use, so the current contents remain until the whole update has been written.
The overlay's file is sparse: places that were never written occupy no disk space.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fluxmoe.core.types import Bytes
from fluxmoe.stores.disk.reader import (
    OFFSET,
    SECTOR,
    Index,
    PageReader,
    checksum,
    failure,
    sectors,
    write,
)


class Overlay(PageReader):
    """The replaced pages of one tier; at first, there are none.

    Args:
        folder: Folder on whose disk the file is created.
        pages: Number of pages of the model.
        sizes: Bytes of each part before encoding.
        direct: Read pages that are not in the page cache with direct I/O.

    Raises:
        PageFileError: A system call failed, for example because the disk is full.
    """

    def __init__(self, folder: Path, pages: int, sizes: Sequence[int], *, direct: bool) -> None:
        self._place = sum(map(sectors, sizes))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fd = _nameless(folder)
        except OSError as error:
            raise failure(error, folder, "of changed weights cannot be created") from error
        index = np.zeros((pages, len(sizes), 4), np.uint64)
        fix = "start again: the weights of the checkpoint are unchanged"
        super().__init__(fd, folder, index, sizes, direct=direct, fix=fix)

    def write(self, page: int, kept: Sequence[Bytes], raw_sums: Sequence[int]) -> Index:
        """Write a page's new contents to its free place; return the entry for ``replace``.

        Args:
            page: Number of the page.
            kept: The page's parts in stored form, none longer than before encoding.
            raw_sums: Checksums of the parts before encoding.

        Raises:
            PageFileError: A system call failed, for example because the disk is full.
        """
        offset = SECTOR + 2 * page * self._place
        if self.index[page, 0, OFFSET] == offset:
            offset += self._place
        entry: Index = np.empty_like(self.index[page])
        try:
            for part, (data, total) in enumerate(zip(kept, raw_sums, strict=True)):
                write(self._fd, data, offset)
                entry[part] = offset, len(data), checksum(data), total
                offset += sectors(len(data))
            if os.fstat(self._fd).st_size < offset:  # the last sector is read as a whole
                os.ftruncate(self._fd, offset)
        except OSError as error:
            raise failure(error, self.path, "of changed weights cannot be written") from error
        return entry

    def replace(self, page: int, entry: Index) -> None:
        """Make later reads find a page's new contents. Not called while any page is being read."""
        self.index[page] = entry
        self.verified[page] = False


def _nameless(folder: Path) -> int:
    """Open a new file that is in ``folder`` but that no other process can find."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:  # not every file system supports O_TMPFILE
        fd, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)
        return fd
