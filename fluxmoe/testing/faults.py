"""Stores and substrates that fail or wait at points chosen by a test."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Sequence

from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.core.transfer.store import AddressedStore, Store
from fluxmoe.core.types import Bytes, Int64s
from fluxmoe.errors import StoreError

_PATIENCE = 30.0  # seconds; a test that never opens a gate fails instead of hanging


class FaultPlan:
    """Makes one site fail on its n-th call, once or from then on. Thread-safe.

    Attributes:
        passed: Number of calls per site.
        struck: Number of failures per site.
    """

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self._armed: tuple[str, range, BaseException] | None = None
        self._lock = threading.Lock()

    def arm(self, site: str, error: BaseException, nth: int = 1, *, lasting: bool = False) -> None:
        """Raise ``error`` on the ``nth`` call to ``site`` from now on, replacing earlier plans.

        If ``lasting``, all later calls raise the error as well, until ``disarm``.
        """
        first = self.passed[site] + nth
        self._armed = (site, range(first, sys.maxsize if lasting else first + 1), error)

    def disarm(self) -> None:
        """Stop all failures."""
        self._armed = None

    def reach(self, site: str) -> None:
        """Count a call to a site, and fail if the plan is armed for this call."""
        with self._lock:
            self.passed[site] += 1
            if self._armed is None:
                return
            armed, passages, error = self._armed
            if site != armed or self.passed[site] not in passages:
                return
            self.struck[site] += 1
        raise error


class FaultyStore:
    """Reads from another store, but fails for ``broken`` pages and waits for held pages.

    Every read calls the site ``read`` of the plan. A failed read leaves half a page behind.

    Attributes:
        broken: Pages that currently cannot be read.
        reads: Pages in the order in which reads began.
    """

    def __init__(self, store: Store, plan: FaultPlan | None = None) -> None:
        self._store, self.plan = store, plan or FaultPlan()
        self.broken: set[int] = set()
        self.reads: list[int] = []
        self._gates: dict[int, threading.Event] = {}
        self._begun: dict[int, threading.Event] = {}

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    def hold(self, page: int) -> None:
        """Make reads of ``page`` wait until ``let_go``."""
        self._gates[page], self._begun[page] = threading.Event(), threading.Event()

    def wait_until_reading(self, page: int) -> None:
        """Wait until a read of the held ``page`` has begun."""
        if not self._begun[page].wait(_PATIENCE):
            raise TimeoutError(f"page {page} is not being read")

    def let_go(self, page: int) -> None:
        self._gates[page].set()

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        self.reads.append(page)
        if page in self._gates:
            self._begun[page].set()
            if not self._gates[page].wait(_PATIENCE):
                raise TimeoutError(f"page {page} is still held")
        try:
            self.plan.reach("read")
            if page in self.broken:
                raise StoreError(f"page {page} is broken")
        except BaseException:
            for part in parts:
                part[: len(part) // 2] = 0xEE  # like an interrupted read
            raise
        self._store.read_into(page, parts)

    def close(self) -> None:
        self._store.close()


class FaultyAddressedStore(FaultyStore):
    """A ``FaultyStore`` for an ``AddressedStore``, where ``hold`` has no effect."""

    def __init__(self, store: AddressedStore, plan: FaultPlan | None = None) -> None:
        super().__init__(store, plan)
        self._addressed = store

    def addresses(self, page: int) -> Sequence[int]:
        self.reads.append(page)
        self.plan.reach("read")
        if page in self.broken:
            raise StoreError(f"page {page} is broken")
        return self._addressed.addresses(page)


class FaultySubstrate:
    """A failing substrate with the sites ``reserve``, ``commit``, ``decommit`` and ``release``."""

    def __init__(self, substrate: Substrate, plan: FaultPlan | None = None) -> None:
        self._substrate, self.plan = substrate, plan or FaultPlan()
        self.count, self.frame_bytes = substrate.count, substrate.frame_bytes
        self.device = substrate.device

    def reserve(self, nbytes: int) -> int:
        self.plan.reach("reserve")
        return self._substrate.reserve(nbytes)

    def unreserve(self, address: int, nbytes: int, viewed: object | None = None) -> None:
        self._substrate.unreserve(address, nbytes, viewed)

    def commit(self, address: int, frames: Int64s) -> None:
        self.plan.reach("commit")
        self._substrate.commit(address, frames)

    def decommit(self, address: int, count: int) -> None:
        self.plan.reach("decommit")
        self._substrate.decommit(address, count)

    def release(self, frames: Int64s) -> None:
        self.plan.reach("release")
        self._substrate.release(frames)

    def allocated(self) -> int:
        return self._substrate.allocated()

    def close(self) -> None:
        self._substrate.close()
