"""Replaced pages of a page file, in a file without a name that ends with this process.

A page file belongs to its checkpoint, and other processes read it: it is never changed. A page has
two places in the overlay, large enough for its original. New contents go to the one not in use, so
the current ones remain until all of an update has been written. The file is sparse: places that
were never written occupy nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from fluxmoe.core.types import Bytes, PageClass
from fluxmoe.stores.parts import (
    OFFSET,
    SECTOR,
    Index,
    PartReader,
    checksum,
    failure,
    sectors,
    write,
)


class Overlay(PartReader):
    """The replaced pages of one tier, at first none.

    Args:
        folder: Folder on whose disk the file is.
        pages: Number of pages of the model.
        page_class: Parts of a page.
        direct: Read uncached parts with direct I/O.

    Raises (also ``write``):
        PageFileError: A system call failed, for example because the disk is full.
    """

    def __init__(self, folder: Path, pages: int, page_class: PageClass, *, direct: bool) -> None:
        *self._starts, self._place = accumulate(
            (sectors(part.nbytes) for part in page_class.parts), initial=0
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fd = _nameless(folder)
        except OSError as error:
            raise failure(error, folder, "of changed weights cannot be created") from error
        index = np.zeros((pages, len(page_class.parts), 4), np.uint64)
        fix = "start again: the weights of the checkpoint are unchanged"
        super().__init__(fd, index, folder, direct=direct, fix=fix)

    def holds(self, page: int) -> bool:
        """True if the page was replaced."""
        return bool(self.index[page, 0, OFFSET])

    def write(self, page: int, kept: Sequence[Bytes], raw_sums: Sequence[int]) -> Index:
        """Write a page's new contents to its free place; return its entry for ``index``.

        Args:
            kept: Its parts in stored form, none longer than its original.
            raw_sums: Checksums of the originals.
        """
        start = SECTOR + 2 * page * self._place
        if self.index[page, 0, OFFSET] == start:
            start += self._place
        entry: Index = np.empty_like(self.index[page])
        try:
            for part, (data, total) in enumerate(zip(kept, raw_sums, strict=True)):
                offset = start + self._starts[part]
                write(self._fd, data, offset)
                entry[part] = offset, len(data), checksum(data), total
        except OSError as error:
            raise failure(error, self.path, "of changed weights cannot be written") from error
        return entry


def _nameless(folder: Path) -> int:
    """Open a new file in ``folder`` that no other process can find."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:  # not every file system has them
        fd, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)
        return fd
