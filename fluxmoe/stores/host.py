"""Pages in host memory: taken over layer by layer without a copy, or encoded page by page."""

from __future__ import annotations

import mmap
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from fluxmoe.core.compiled.rows import copy_pages
from fluxmoe.core.transfer.store import Put, Reader
from fluxmoe.core.types import Bytes, Geometry, Int64s, PageClass
from fluxmoe.errors import StoreError
from fluxmoe.stores.coding import Coder

#: Bytes reserved at a time. The operating system allocates only what is written.
_CHUNK = 64 << 20


class HostStore:
    """A store that holds each layer's parts as the given uint8 arrays ``[experts, part bytes]``."""

    def __init__(self, geometry: Geometry, page_class: PageClass) -> None:
        self._geometry, self._page_class = geometry, page_class
        self._layers: list[list[Bytes]] = []
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

        read(targets[:0], targets[:0])  # so that it is compiled or loaded before the first event
        return read

    @contextmanager
    def update(self) -> Iterator[Put]:
        """See ``ChangingStore``. New pages are held beside the old ones until the update ends."""
        staged: dict[int, list[Bytes]] = {}

        def put(page: int, parts: Sequence[Bytes]) -> None:
            require_page(self._geometry, self._page_class, page, parts, staged)
            staged[page] = [part.copy() for part in parts]

        yield put
        for page, parts in staged.items():
            layer, expert = divmod(page, self._geometry.experts_per_layer)
            for rows, part in zip(self._layers[layer], parts, strict=True):
                np.copyto(rows[expert], part)

    def close(self) -> None:
        self._first[:] = 0
        self._layers.clear()


class HostTier:
    """A tier that keeps its pages in host memory, encoded.

    Args:
        coder: Encodes the pages.
        limit: Maximum size of the pages in bytes; None if unlimited.
    """

    def __init__(self, coder: Coder, limit: int | None) -> None:
        self._coder, self._limit = coder, limit
        self._pages: dict[int, list[Bytes]] = {}
        self._staged: dict[int, list[Bytes]] = {}
        self._growth = 0  # of ``nbytes``, once the staged pages are committed
        self._room = np.empty(0, np.uint8)
        self.nbytes = 0

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
            self._room = _anonymous(max(nbytes, _CHUNK))
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
        """Return the bytes that a page occupies; 0 if the page is not in this tier."""
        return sum(_lines(part) for part in self._pages.get(page, ()))

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        for kept, part in zip(self._pages[page], parts, strict=True):
            self._coder.decode(kept, part)

    def close(self) -> None:
        self._pages.clear()
        self.discard()
        self._room = np.empty(0, np.uint8)
        self.nbytes = 0


def require_layer(
    geometry: Geometry, page_class: PageClass, layer: int, parts: Sequence[Bytes]
) -> None:
    """Raise StoreError unless ``parts`` can be adopted as ``layer``, the next layer."""
    if layer == geometry.num_layers:
        raise StoreError(f"the store already has all {layer} layers")
    got = [part.shape for part in parts]
    expected = [(geometry.experts_per_layer, part.nbytes) for part in page_class.parts]
    if got != expected:
        raise StoreError(f"layer {layer} has parts of shape {got}, expected {expected}")
    if any(part.dtype != np.uint8 for part in parts):
        dtypes = [str(part.dtype) for part in parts]
        raise StoreError(f"layer {layer} has parts of {dtypes}, expected uint8")
    if not all(part.flags.c_contiguous for part in parts):
        raise StoreError(f"layer {layer} has parts that are not contiguous")


def require_page(
    geometry: Geometry,
    page_class: PageClass,
    page: int,
    parts: Sequence[Bytes],
    staged: Container[int],
) -> None:
    """Raise StoreError unless ``parts`` can replace ``page`` and ``page`` is not ``staged`` yet."""
    if not 0 <= page < geometry.num_pages:
        raise StoreError(f"there is no page {page}: the last page is {geometry.num_pages - 1}")
    if page in staged:
        raise StoreError(f"page {page} is put twice")
    got = [(part.shape, str(part.dtype)) for part in parts]
    expected = [((part.nbytes,), "uint8") for part in page_class.parts]
    if got != expected:
        raise StoreError(f"page {page} has parts {got}, expected {expected}")


def _lines(part: Bytes) -> int:
    """Return the bytes that a part occupies, in whole cache lines."""
    return -(-len(part) // 64) * 64


def _anonymous(nbytes: int) -> Bytes:
    """Allocate anonymous memory outside the heap, which the encoded pages would fragment."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8)
