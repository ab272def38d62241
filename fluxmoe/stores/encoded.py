"""The class ``HostTier``: encoded pages in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxmoe.core.types import Bytes
from fluxmoe.stores.coding import Coder
from fluxmoe.stores.host import anonymous

#: Bytes reserved at a time. The operating system allocates only what is written.
_CHUNK = 64 << 20


class HostTier:
    """A tier that keeps its pages in host memory, encoded.

    Args:
        coder: Encodes the pages.
        limit: Maximum size of the pages in bytes; None if unlimited.
    """

    depth, meters = 0, ()  # nothing is read from a disk

    def __init__(self, coder: Coder, limit: int | None) -> None:
        self._coder, self._limit = coder, limit
        self._pages: dict[int, list[Bytes]] = {}
        self._staged: dict[int, list[Bytes]] = {}
        self._growth = 0  # of ``nbytes`` when the staged pages are committed
        self._room = np.empty(0, np.uint8)
        self.nbytes = 0

    def claim(self, page: int) -> bool:
        """Return False: the tier has no pages from an earlier start."""
        return False

    def put(self, page: int, parts: Sequence[Bytes]) -> bool:
        kept = self.stage(page, parts)
        self.commit()
        return kept

    def finish(self) -> None:
        """Do nothing: all pages are in place."""

    def stage(self, page: int, parts: Sequence[Bytes]) -> bool:
        kept = [self._coder.encode(part) for part in parts]
        nbytes = sum(_lines(part) for part in kept)
        growth = self._growth + nbytes - self._held(page)
        if self._limit is not None and self.nbytes + growth > self._limit:
            return False
        if len(self._room) < nbytes:
            self._room = anonymous(max(nbytes, _CHUNK))
        self._staged[page] = []
        for part in kept:
            place = self._room[: len(part)]
            np.copyto(place, part)
            self._staged[page].append(place)
            self._room = self._room[_lines(part) :]
        self._growth = growth
        return True

    def commit(self) -> None:
        self._pages |= self._staged
        self.nbytes += self._growth
        self.discard()

    def discard(self) -> None:
        self._staged, self._growth = {}, 0

    def forget(self, page: int) -> None:
        self.nbytes -= self._held(page)
        del self._pages[page]

    def _held(self, page: int) -> int:
        """Return the number of bytes that a page occupies; 0 if the page is not in this tier."""
        return sum(_lines(part) for part in self._pages.get(page, ()))

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        for kept, part in zip(self._pages[page], parts, strict=True):
            self._coder.decode(kept, part)

    def ahead(self, page: int, parts: Sequence[Bytes]) -> None:
        """Return None: pages in memory are decoded by the threads that need them."""

    def close(self) -> None:
        self._pages.clear()
        self.discard()
        self._room = np.empty(0, np.uint8)
        self.nbytes = 0


def _lines(part: Bytes) -> int:
    """Return the number of bytes that a part occupies, rounded up to whole cache lines."""
    return -(-len(part) // 64) * 64
