"""Page-locked host memory: pages that a device fetches directly, and buffers for other pages."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from fluxmoe.core.transfer.store import AddressedStore, Store, locate, read
from fluxmoe.core.types import Bytes, Geometry, PageClass
from fluxmoe.cuda.batches import CopyBatch
from fluxmoe.cuda.driver import CudaDriver
from fluxmoe.errors import StoreError
from fluxmoe.stores.host import HostStore

#: Number of page buffers: this many pages can be read before the first copy completes.
BUFFERS = 4
_ENDLESS = 1 << 30


class PageSource:
    """A store's pages at addresses that a device can fetch from.

    Args:
        cuda: The device.
        store: The store that holds the pages.
        part_bytes: Bytes of each part of a page, in order.

    Raises:
        SubstrateError: The memory for the buffers cannot be locked.
    """

    def __init__(self, cuda: CudaDriver, store: Store, part_bytes: Sequence[int]) -> None:
        self.page_bytes = sum(part_bytes)
        self._store = store
        self._addressed = store if isinstance(store, AddressedStore) else None
        self._memory: PinnedMemory | None = None
        self._buffers: list[list[Bytes]] = []
        self._free: list[int] = []
        if self._addressed is None:
            self._memory = PinnedMemory(cuda, BUFFERS * self.page_bytes)
            cuts = np.cumsum(part_bytes)[:-1].tolist()
            pages = self._memory.array.reshape(BUFFERS, self.page_bytes)
            self._buffers = [np.split(page, cuts) for page in pages]
            self._free = list(range(BUFFERS))

    @property
    def room(self) -> int:
        """Number of pages that can be fetched without waiting for a buffer."""
        return _ENDLESS if self._addressed is not None else len(self._free)

    def fetch(self, page: int, batch: CopyBatch) -> Sequence[int]:
        """Return the addresses of a page's parts, valid until ``give_back(batch)``.

        Raises:
            StoreError: The page could not be read.
        """
        if self._addressed is not None:
            return locate(self._addressed, page)
        batch.buffers.append(self._free.pop())
        parts = self._buffers[batch.buffers[-1]]
        read(self._store, page, parts)
        return [part.ctypes.data for part in parts]

    def give_back(self, batch: CopyBatch) -> None:
        """Free the buffers of a batch whose copies are complete."""
        self._free += batch.buffers

    def close(self) -> None:
        self._buffers, self._free = [], []
        if self._memory is not None:
            self._memory.close()


class PinnedMemory:
    """Page-locked host memory, which a device reads directly at the link's full speed.

    Attributes:
        array: uint8 ``[nbytes]``; must not be used after ``close``.

    Raises:
        SubstrateError: The requested amount of memory cannot be locked.
    """

    def __init__(self, cuda: CudaDriver, nbytes: int) -> None:
        self._cuda = cuda
        with cuda.current():
            self._address: int | None = int(cuda.call("cuMemHostAlloc", nbytes, 0))
        buffer = (ctypes.c_uint8 * nbytes).from_address(self._address)
        self.array: Bytes = np.ctypeslib.as_array(buffer)

    def close(self) -> None:
        """Free the memory. Idempotent."""
        if self._address is not None:
            with self._cuda.current():
                self._cuda.call("cuMemFreeHost", self._address)
            self._address = None


class PinnedStore(HostStore):
    """A host store that copies its arrays into page-locked memory, layer by layer.

    Implements ``AddressedStore``.

    Args:
        cuda: The device that reads the pages; not closed with the store.
        geometry: Layers and experts.
        page_class: Layout of a page.
    """

    def __init__(self, cuda: CudaDriver, geometry: Geometry, page_class: PageClass) -> None:
        super().__init__(geometry, page_class)
        self._cuda = cuda
        self._memory: list[PinnedMemory] = []

    def adopt(self, parts: Sequence[Bytes]) -> None:
        """Copy the next layer: one array ``[experts, nbytes]`` per part of the page class.

        Raises:
            SubstrateError: The memory for the layer cannot be locked; the layer was not added.
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
            undo.pop_all()

    def addresses(self, page: int) -> Sequence[int]:
        """Return the start addresses of a page's parts, in order.

        Raises:
            StoreError: The page is not in the store.
        """
        layer, expert = divmod(page, self._geometry.experts_per_layer)
        if not 0 <= layer < len(self._layers):
            raise StoreError(f"page {page} is not in the store")
        addresses: list[int] = (self._first[layer] + expert * self._sizes).tolist()
        return addresses

    def close(self) -> None:
        super().close()
        with ExitStack() as each:  # runs all callbacks even if one fails
            for memory in self._memory:
                each.callback(memory.close)
