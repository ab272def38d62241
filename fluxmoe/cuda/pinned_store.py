"""Pages in page-locked host memory, which a CUDA device fetches by itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from fluxmoe.core.types import Bytes, Geometry, PageClass
from fluxmoe.cuda.driver import Cuda
from fluxmoe.cuda.pinned import PinnedMemory
from fluxmoe.errors import StoreError
from fluxmoe.stores.host import HostStore


class PinnedStore(HostStore):
    """A host store that copies the arrays it is given into page-locked memory, layer by layer.

    Implements ``AddressedStore``.

    Args:
        cuda: The device that will read; not closed with the store.
        geometry: Layers and experts.
        page_class: Layout of a page.
    """

    def __init__(self, cuda: Cuda, geometry: Geometry, page_class: PageClass) -> None:
        super().__init__(geometry, page_class)
        self._cuda = cuda
        self._memory: list[PinnedMemory] = []
        #: Per layer and part, where expert 0 lies and the bytes of an expert.
        self._places: list[list[tuple[int, int]]] = []

    def adopt(self, parts: Sequence[Bytes]) -> None:
        """Copy the next layer: one array ``[experts, nbytes]`` per part of the page class.

        Raises:
            SubstrateError: The system has not so much memory to lock; the layer is not there.
        """
        with ExitStack() as undo:
            copies, memory = [], []
            for part in parts:
                memory.append(PinnedMemory(self._cuda, part.nbytes))
                undo.callback(memory[-1].close)
                copies.append(memory[-1].array.view(part.dtype).reshape(part.shape))
            super().adopt(copies)
            for part, copy in zip(parts, copies, strict=True):
                np.copyto(copy, part)
            self._memory += memory
            sizes = [part.nbytes for part in self._page_class.parts]
            places = [copy.ctypes.data for copy in copies]
            self._places.append(list(zip(places, sizes, strict=True)))
            undo.pop_all()

    def addresses(self, page: int) -> Sequence[int]:
        """Where a page's parts begin, in order."""
        layer, expert = divmod(page, self._geometry.experts_per_layer)
        if not 0 <= layer < len(self._places):
            raise StoreError(f"page {page} is not in the store")
        return [first + expert * nbytes for first, nbytes in self._places[layer]]

    def close(self) -> None:
        super().close()
        self._places.clear()
        with ExitStack() as each:  # goes on if one fails
            for memory in self._memory:
                each.callback(memory.close)
