"""Uncompressed pages in host memory, adopted layer by layer or copied page by page."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from fluxmoe.core.compiled.rows import copy_pages
from fluxmoe.core.transfer.store import Put, Reader
from fluxmoe.core.types import Bytes, Geometry, Int64s, PageClass
from fluxmoe.errors import StoreError
from fluxmoe.stores.layout import require_layer, require_page


class HostStore:
    """A store that holds each layer's parts as uint8 arrays ``[experts, part bytes]``."""

    def __init__(self, geometry: Geometry, page_class: PageClass) -> None:
        self._geometry, self._page_class = geometry, page_class
        self._layers: list[list[Bytes]] = []
        self._put: set[int] = set()
        self._sizes = np.array([part.nbytes for part in page_class.parts])
        #: Address of expert 0, per layer and part; 0 for layers that were not adopted.
        self._first = np.zeros((geometry.num_layers, len(self._sizes)), np.int64)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self._layers for part in layer)

    def adopt(self, parts: Sequence[Bytes]) -> None:
        """Take over the next layer, one array ``[experts, nbytes]`` per part of the page class."""
        layer = len(self._layers)
        require_layer(self._geometry, self._page_class, layer, parts)
        self._layers.append(list(parts))
        self._first[layer] = [part.ctypes.data for part in parts]

    def claim(self, page: int) -> bool:
        """Return False: the store has no pages from an earlier start."""
        return False

    def put(self, page: int, parts: Sequence[Bytes]) -> None:
        """Keep a copy of a page, given as one uint8 array ``[part bytes]`` per part."""
        require_page(self._geometry, self._page_class, page, parts, given=page in self._put)
        if not self._put:
            experts = self._geometry.experts_per_layer
            for _ in range(self._geometry.num_layers):
                self.adopt([anonymous(experts * size).reshape(experts, size)
                            for size in self._sizes.tolist()])  # fmt: skip
        self._put.add(page)
        layer, expert = divmod(page, self._geometry.experts_per_layer)
        for rows, part in zip(self._layers[layer], parts, strict=True):
            np.copyto(rows[expert], part)

    def finish(self) -> None:
        """Complete the store after the last ``put``.

        Raises:
            StoreError: Pages are missing.
        """
        if missing := self._geometry.num_pages - len(self._put):
            raise StoreError(f"{missing} of {self._geometry.num_pages} pages are missing")

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        layer, expert = divmod(page, self._geometry.experts_per_layer)
        if not 0 <= layer < len(self._layers):
            raise StoreError(f"page {page} is not in the store")
        for source, target in zip(self._layers[layer], parts, strict=True):
            np.copyto(target, source[expert])

    def reader(self, arenas: Sequence[Bytes]) -> Reader:
        """Make a reader that copies all parts of all pages in one compiled call."""
        if [(rows.shape[1], rows.flags.c_contiguous) for rows in arenas] != [
            (size, True) for size in self._sizes
        ]:
            raise StoreError("the arenas do not match the pages' parts")
        experts = self._geometry.experts_per_layer
        targets = np.array([rows.ctypes.data for rows in arenas])

        def read(pages: Int64s, slots: Int64s) -> None:
            rows = len(arenas[0])  # this reference also keeps the arenas alive
            copied = copy_pages(self._first, self._sizes, experts, targets, rows, pages, slots)
            if copied < len(pages):
                raise StoreError(f"page {pages[copied]} is not in the store")

        read(targets[:0], targets[:0])  # compiles or loads ``copy_pages`` before the first event
        return read

    @contextmanager
    def update(self) -> Iterator[Put]:
        """See ``ChangingStore``. New pages are held beside the old ones until the update ends."""
        staged: dict[int, list[Bytes]] = {}

        def put(page: int, parts: Sequence[Bytes]) -> None:
            require_page(self._geometry, self._page_class, page, parts, given=page in staged)
            staged[page] = [part.copy() for part in parts]

        yield put
        for page, parts in staged.items():
            layer, expert = divmod(page, self._geometry.experts_per_layer)
            for rows, part in zip(self._layers[layer], parts, strict=True):
                np.copyto(rows[expert], part)

    def close(self) -> None:
        self._first[:] = 0
        self._layers.clear()


def anonymous(nbytes: int) -> Bytes:
    """Allocate anonymous memory outside the heap, which pages would fragment."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8)
