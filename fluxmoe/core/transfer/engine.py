"""The class ``TransferEngine``: orders copies into slots, on demand or ahead, and cancels them.

*Demand* copies must complete before the layer's kernel runs. *Prefetch* copies run when there is no
other work. A slot may be assigned to another page while an old copy into that slot is still queued.
So each copy is recorded under its slot, and before a slot is written again, the old copy is
cancelled or completed (the slot is *settled*). The ``Copier`` moves the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from fluxmoe.core.types import Loads


class PendingCopy(Protocol):
    """A copy that was ordered ahead of time."""

    def withdraw(self) -> bool:
        """Cancel the copy if it has not begun; return True if it was cancelled."""

    def error(self) -> Exception | None:
        """Ensure that a copy that has begun completes before its slot is written again.

        Returns the copy's error, if any.
        """


class Copier(Protocol):
    """Copies pages into slots. Called on the engine's thread.

    Attributes:
        stall_seconds: Time that layers have waited for pages.
    """

    stall_seconds: float

    def demand(self, loads: Loads) -> None:
        """Copy pages before the next kernel runs, ahead of all prefetches.

        Raises:
            StoreError: A page could not be read; which of the others were copied is undefined.
        """

    def prefetch(self, loads: Loads) -> Iterable[PendingCopy | None]:
        """Order copies, most urgent first; None stands for a copy that is already complete.

        A copy may begin only when the caller requests the next one, so that the caller has recorded
        the copy even if Ctrl-C interrupts the iteration.
        """

    def arrive(self, copy: PendingCopy) -> Exception | None:
        """Ensure that a copy that has begun completes before the next kernel runs.

        Returns the copy's error, if any.
        """

    def move(self, bank: int, source: int, target: int) -> None:
        """Copy the contents of one slot to another before the next kernel runs.

        Raises:
            StoreError: The copy failed.
        """

    def close(self) -> None:
        """Finish copies that have begun, then stop. Idempotent."""


class TransferEngine:
    """Copies pages into the slots of all banks.

    Args:
        copier: Makes the copies.
        page_bytes: Size of one page in bytes, for the counters.
    """

    def __init__(self, copier: Copier, page_bytes: int) -> None:
        self._copier, self._page_bytes = copier, page_bytes
        self._queued: dict[tuple[int, int], PendingCopy] = {}
        self.bytes_demand = self.bytes_prefetch = 0

    @property
    def busy(self) -> bool:
        """True if there are prefetches in flight: queued, and not yet completed or settled."""
        return bool(self._queued)

    @property
    def stall_seconds(self) -> float:
        """Time that layers have waited for their pages."""
        return self._copier.stall_seconds

    def reset(self) -> None:
        """Settle all slots and reset the counters."""
        self.settle_all()
        self.bytes_demand = self.bytes_prefetch = 0
        self._copier.stall_seconds = 0.0

    def demand(self, loads: Loads) -> None:
        """Copy pages before their slots are read next.

        Raises:
            StoreError: A page could not be read; which of the others were copied is undefined.
        """
        self._settle_for(loads)
        self._copier.demand(loads)
        self.bytes_demand += len(loads) * self._page_bytes

    def prefetch(self, loads: Loads) -> None:
        """Queue copies in the given order. A failed copy is repeated when its page is needed."""
        self._settle_for(loads)
        copies = self._copier.prefetch(loads)
        for copy, slot in zip(copies, loads.slots.tolist(), strict=True):
            if copy is not None:
                self._queued[loads.bank, slot] = copy
        self.bytes_prefetch += len(loads) * self._page_bytes

    def complete(self, bank: int, page: int, slot: int) -> None:
        """Ensure that a page arrives if its prefetch is still in flight.

        If the copy has not begun or has failed, the page is copied immediately.

        Raises:
            StoreError: The page could not be read, even on the second attempt.
        """
        copy = self._queued.get((bank, slot))
        if copy is None:
            return
        late = copy.withdraw() or self._copier.arrive(copy) is not None
        del self._queued[bank, slot]  # not before: Ctrl-C may have ended the wait
        if late:
            self._copier.demand(Loads(bank, np.asarray([page]), np.asarray([slot])))

    def move(self, bank: int, page: int, source: int, target: int) -> None:
        """Copy a resident page from slot ``source`` to slot ``target`` of its bank.

        Raises:
            StoreError: The page was still in flight and could not be read.
        """
        self._settle(bank, target)
        self.complete(bank, page, source)
        self._copier.move(bank, source, target)

    def settle_from(self, bank: int, first: int) -> None:
        """Ensure that no copy into a bank's slots from ``first`` on is running or queued.

        On a device, a copy that has begun may continue: unmapping memory waits for all work on it.
        """
        for key in [key for key in self._queued if key[0] == bank and key[1] >= first]:
            self._settle(*key)

    def close(self) -> None:
        """Cancel queued copies and close the copier. Idempotent."""
        self.settle_all()
        self._copier.close()

    def settle_all(self) -> None:
        """Ensure that no copy is running or queued."""
        for key in list(self._queued):
            self._settle(*key)

    def _settle_for(self, loads: Loads) -> None:
        if self._queued:
            for slot in loads.slots.tolist():
                self._settle(loads.bank, slot)

    def _settle(self, bank: int, slot: int) -> None:
        """Cancel or finish the copy into a slot whose page is no longer needed."""
        copy = self._queued.get((bank, slot))
        if copy is not None:
            if not copy.withdraw():
                copy.error()  # a failure no longer matters
            del self._queued[bank, slot]
