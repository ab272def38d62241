"""Where a device finds pages: in the store itself, or in page-locked buffers they are read into."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from fluxmoe.core.transfer.store import AddressedStore, Store, locate, read
from fluxmoe.core.types import Bytes
from fluxmoe.cuda.driver import Cuda
from fluxmoe.cuda.flights import Flight

#: Pages that are read into buffers before the first of them has been copied.
BUFFERS = 4
_ENDLESS = 1 << 30


class Source:
    """A store's pages, at addresses that a device can fetch them from.

    Args:
        cuda: The device.
        store: Where pages come from.
        part_bytes: Bytes of a page's parts, in order.

    Raises:
        SubstrateError: There is no page-locked memory left for the buffers.
    """

    def __init__(self, cuda: Cuda, store: Store, part_bytes: Sequence[int]) -> None:
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
        """Pages that can be fetched now."""
        return _ENDLESS if self._addressed is not None else len(self._free)

    def fetch(self, page: int, flight: Flight) -> Sequence[int]:
        """The addresses of a page's parts, valid until ``flight`` is given back.

        Raises:
            StoreError: The page could not be read.
        """
        if self._addressed is not None:
            return locate(self._addressed, page)
        flight.buffers.append(self._free.pop())
        parts = self._buffers[flight.buffers[-1]]
        read(self._store, page, parts)
        return [part.ctypes.data for part in parts]

    def give_back(self, flight: Flight) -> None:
        """A flight's copies are over."""
        self._free += flight.buffers

    def close(self) -> None:
        self._buffers, self._free = [], []
        if self._memory is not None:
            self._memory.close()


class PinnedMemory:
    """Page-locked host memory, which a device reads by itself and at the link's full speed.

    Attributes:
        array: uint8 ``[nbytes]``; not to be used after ``close``.

    Raises:
        SubstrateError: The system has not so much to lock.
    """

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self._cuda = cuda
        with cuda.current():
            self._address: int | None = int(cuda.call("cuMemHostAlloc", nbytes, 0))
        buffer = (ctypes.c_uint8 * nbytes).from_address(self._address)
        self.array: Bytes = np.ctypeslib.as_array(buffer)

    def close(self) -> None:
        """Idempotent."""
        if self._address is not None:
            with self._cuda.current():
                self._cuda.call("cuMemFreeHost", self._address)
            self._address = None
