"""TransferEngine: orders copies into slots, on demand or ahead of time, and cancels them.

*Demand* copies must complete before the layer's kernel runs. *Prefetch* copies run when there is no
other work. A slot may be assigned to another page while an old copy into it is still queued, so
each copy is recorded under its slot, and a slot is settled before it is written again. The
``Copier`` moves the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fluxmoe.core.types import Loads


class PendingCopy(Protocol):
    """A copy ordered ahead of time."""

    def withdraw(self) -> bool:
        """Cancel the copy if it has not begun; True if it was cancelled."""

    def error(self) -> Exception | None:
        """Ensure that a copy that has begun completes before its slot is written again.

        Returns its error, if any.
        """


class Copier(Protocol):
    """Copies pages into slots. Called on the engine's thread.

    Attributes:
        stall_seconds: Time that layers waited for pages.
    """

    stall_seconds: float

    def demand(self, loads: Loads) -> None:
        """Copy before the next kernel runs, ahead of all prefetches.

        Raises:
            StoreError: A page could not be read; which of the others were copied is undefined.
        """

    def prefetch(self, loads: Loads) -> Sequence[PendingCopy | None]:
        """Order copies, most urgent first; None stands for a copy that is already complete."""

    def arrive(self, copy: PendingCopy) -> Exception | None:
        """Ensure that a copy that has begun completes before the next kernel runs.

        Returns its error, if any.
        """

    def move(self, bank: int, source: int, target: int) -> None:
        """Copy one slot to another before the next kernel runs.

        Raises:
            StoreError: The copy failed.
        """

    def close(self) -> None:
        """Finish copies that have begun, then stop. Idempotent."""


class TransferEngine:
    """Copies pages into the slots of all banks.

    Args:
        copier: Makes the copies.
        page_bytes: Bytes of one page, for the counters.
    """

    def __init__(self, copier: Copier, page_bytes: int) -> None:
        self._copier, self._page_bytes = copier, page_bytes
        self._queued: dict[tuple[int, int], PendingCopy] = {}
        self.bytes_demand = self.bytes_prefetch = 0

    @property
    def busy(self) -> bool:
        """True if prefetches are queued whose pages have not been needed yet."""
        return bool(self._queued)

    @property
    def stall_seconds(self) -> float:
        """Time that layers have waited for their pages."""
        return self._copier.stall_seconds

    def reset(self) -> None:
        """Settle everything and reset the counters."""
        self._settle_all()
        self.bytes_demand = self.bytes_prefetch = 0
        self._copier.stall_seconds = 0.0

    def demand(self, loads: Loads) -> None:
        """Copy before the slots are read next.

        Raises:
            StoreError: A page could not be read; which of the others were copied is undefined.
        """
        self._settle_for(loads)
        self._copier.demand(loads)
        self.bytes_demand += len(loads) * self._page_bytes

    def prefetch(self, loads: Loads) -> None:
        """Queue copies in order. A failed copy is repeated when its page is needed."""
        self._settle_for(loads)
        copies = self._copier.prefetch(loads)
        for slot, copy in zip(loads.slots.tolist(), copies, strict=True):
            if copy is not None:
                self._queued[loads.bank, slot] = copy
        self.bytes_prefetch += len(loads) * self._page_bytes

    def complete(self, bank: int, page: int, slot: int) -> None:
        """Ensure that a prefetched page has arrived if it is still in flight.

        A copy that has not begun or has failed is made immediately.

        Raises:
            StoreError: The page could not be read, even on the second attempt.
        """
        copy = self._queued.pop((bank, slot), None)
        if copy is None:
            return
        if copy.withdraw() or self._copier.arrive(copy) is not None:
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
        """Ensure that no copy into slots ``first …`` of a bank is running or queued.

        On a device, a copy that has begun may continue: unmapping waits for all work on it.
        """
        for key in [key for key in self._queued if key[0] == bank and key[1] >= first]:
            self._settle(*key)

    def close(self) -> None:
        """Cancel queued copies and close the copier. Idempotent."""
        self._settle_all()
        self._copier.close()

    def _settle_all(self) -> None:
        for key in list(self._queued):
            self._settle(*key)

    def _settle_for(self, loads: Loads) -> None:
        if self._queued:
            for slot in loads.slots.tolist():
                self._settle(loads.bank, slot)

    def _settle(self, bank: int, slot: int) -> None:
        """Cancel or finish the copy into a slot whose page is no longer needed."""
        copy = self._queued.pop((bank, slot), None)
        if copy is not None and not copy.withdraw():
            copy.error()  # a failure no longer matters
