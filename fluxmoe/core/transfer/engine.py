"""TransferEngine: the order of copies into slots, now or ahead of time, and which are called off.

Two orders exist. *Demand* copies must be over before the layer's kernel runs. *Prefetch* copies are
made when nothing else is to be done. A slot may be given to another page while an old copy into it
is still queued, so every copy is filed under its slot, and a slot is settled before it is written
again. How bytes are moved is the ``Carrier``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fluxmoe.core.types import Loads

#: Pages and the slots they are to lie in.
Pairs = Sequence[tuple[int, int]]


class Ordered(Protocol):
    """A copy that was ordered ahead of time."""

    def withdraw(self) -> bool:
        """Whether it has not begun; then it never will."""

    def error(self) -> Exception | None:
        """See that a copy that was begun is over before its slot is written again.

        Returns what went wrong with it, if anything.
        """


class Carrier(Protocol):
    """Copies pages into slots. Called on the engine's thread.

    Attributes:
        stall_seconds: How long the layers had to wait for their pages.
    """

    stall_seconds: float

    def demand(self, bank: int, pairs: Pairs) -> None:
        """Copy before the next kernel runs, ahead of all that was only prefetched.

        Raises:
            StoreError: A page cannot be had; which of the others were copied is undefined.
        """

    def prefetch(self, bank: int, pairs: Pairs) -> Sequence[Ordered | None]:
        """Order copies, most urgent first; None in place of one that is over already."""

    def arrive(self, copy: Ordered) -> Exception | None:
        """See that a copy that was begun is over before the next kernel runs."""

    def move(self, bank: int, source: int, target: int) -> None:
        """Copy one slot to another before the next kernel runs.

        Raises:
            StoreError: It cannot be done.
        """

    def close(self) -> None:
        """Finish what has begun, and end. Idempotent."""


class TransferEngine:
    """Copies pages into the slots of all banks.

    Args:
        carrier: What makes the copies.
        page_bytes: Bytes of one page, for the counters.
    """

    def __init__(self, carrier: Carrier, page_bytes: int) -> None:
        self._carrier, self._page_bytes = carrier, page_bytes
        self._queued: dict[tuple[int, int], Ordered] = {}
        self.bytes_demand = self.bytes_prefetch = 0

    @property
    def busy(self) -> bool:
        """Whether prefetches were queued that nobody has asked for yet."""
        return bool(self._queued)

    @property
    def stall_seconds(self) -> float:
        """How long the layers have waited for their pages."""
        return self._carrier.stall_seconds

    def reset(self) -> None:
        """Settle everything and start counting anew."""
        self._settle_all()
        self.bytes_demand = self.bytes_prefetch = 0
        self._carrier.stall_seconds = 0.0

    def demand(self, loads: Loads) -> None:
        """Copy now: whatever reads the slots next finds all pages in them.

        Raises:
            StoreError: A page could not be read; which of the others were is undefined.
        """
        slots = loads.slots.tolist()
        for slot in slots:
            self._settle(loads.bank, slot)
        pairs = list(zip(loads.pages.tolist(), slots, strict=True))
        self._carrier.demand(loads.bank, pairs)
        self.bytes_demand += len(loads) * self._page_bytes

    def prefetch(self, loads: Loads) -> None:
        """Queue copies, in order. A copy that fails is made again when its page is needed."""
        slots = loads.slots.tolist()
        for slot in slots:
            self._settle(loads.bank, slot)
        pairs = list(zip(loads.pages.tolist(), slots, strict=True))
        for slot, copy in zip(slots, self._carrier.prefetch(loads.bank, pairs), strict=True):
            if copy is not None:
                self._queued[loads.bank, slot] = copy
        self.bytes_prefetch += len(loads) * self._page_bytes

    def complete(self, bank: int, page: int, slot: int) -> None:
        """See that a prefetched page, if it is still on its way, has arrived.

        A copy that has not begun, or that failed, is made here and now.

        Raises:
            StoreError: The page could not be read, at the second try either.
        """
        copy = self._queued.pop((bank, slot), None)
        if copy is None:
            return
        if copy.withdraw() or self._carrier.arrive(copy) is not None:
            self._carrier.demand(bank, [(page, slot)])

    def move(self, bank: int, page: int, source: int, target: int) -> None:
        """Copy a resident page from slot ``source`` to slot ``target`` of its bank.

        Raises:
            StoreError: The page was still on its way, and could not be read.
        """
        self._settle(bank, target)
        self.complete(bank, page, source)
        self._carrier.move(bank, source, target)

    def settle_from(self, bank: int, first: int) -> None:
        """See that no copy into slots ``first …`` of a bank is under way or queued any more.

        On a device a copy that has begun may go on: unmapping waits for all its work.
        """
        for key in [key for key in self._queued if key[0] == bank and key[1] >= first]:
            self._settle(*key)

    def close(self) -> None:
        """Call off what is queued, and end the carrier. Idempotent."""
        self._settle_all()
        self._carrier.close()

    def _settle_all(self) -> None:
        for key in list(self._queued):
            self._settle(*key)

    def _settle(self, bank: int, slot: int) -> None:
        """The page on its way to a slot is not wanted there any more."""
        copy = self._queued.pop((bank, slot), None)
        if copy is not None and not copy.withdraw():
            copy.error()  # whether it failed no longer matters
