"""Stores and substrates that fail, or wait, exactly where a test tells them to."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fluxmoe.core.store import Store
from fluxmoe.core.substrate import Substrate
from fluxmoe.core.types import Bytes, Int64s
from fluxmoe.errors import StoreError, SubstrateError

_PATIENCE = 30.0  # seconds; a test that forgets to open a gate fails instead of hanging


class FaultyStore:
    """Reads from another store, but fails for ``broken`` pages and waits for ``held`` ones.

    Attributes:
        broken: Pages that cannot be read at present.
        reads: Pages in the order in which their reading began.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.broken: set[int] = set()
        self.reads: list[int] = []
        self._gates: dict[int, threading.Event] = {}
        self._begun: dict[int, threading.Event] = {}

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    def hold(self, page: int) -> None:
        """Let reads of ``page`` wait until ``let_go``."""
        self._gates[page], self._begun[page] = threading.Event(), threading.Event()

    def wait_until_reading(self, page: int) -> None:
        """Wait until somebody has begun to read the held ``page``."""
        if not self._begun[page].wait(_PATIENCE):
            raise TimeoutError(f"nobody reads page {page}")

    def let_go(self, page: int) -> None:
        self._gates[page].set()

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        self.reads.append(page)
        if page in self._gates:
            self._begun[page].set()
            if not self._gates[page].wait(_PATIENCE):
                raise TimeoutError(f"page {page} is still held")
        if page in self.broken:
            for part in parts:
                part[: len(part) // 2] = 0xEE  # what a read that broke off may leave behind
            raise StoreError(f"page {page} is broken")
        self._store.read_into(page, parts)

    def close(self) -> None:
        self._store.close()


class FaultySubstrate:
    """Another substrate whose ``commit`` fails after ``commits_left`` more calls (None: never)."""

    def __init__(self, substrate: Substrate) -> None:
        self._substrate = substrate
        self.count, self.frame_bytes = substrate.count, substrate.frame_bytes
        self.commits_left: int | None = None

    def reserve(self, nbytes: int) -> int:
        return self._substrate.reserve(nbytes)

    def unreserve(self, address: int, nbytes: int) -> None:
        self._substrate.unreserve(address, nbytes)

    def commit(self, address: int, frames: Int64s) -> None:
        if self.commits_left == 0:
            raise SubstrateError("cannot map: injected fault")
        if self.commits_left is not None:
            self.commits_left -= 1
        self._substrate.commit(address, frames)

    def decommit(self, address: int, count: int) -> None:
        self._substrate.decommit(address, count)

    def release(self, frames: Int64s) -> None:
        self._substrate.release(frames)

    def allocated(self) -> int:
        return self._substrate.allocated()

    def close(self) -> None:
        self._substrate.close()
