"""TransferEngine: copies pages from a store into slots, now or ahead of time.

Two orders exist. *Demand* copies must be done before the layer's kernel runs: the caller's thread
makes them, together with the copy threads if there are any. *Prefetch* copies are queued for the
copy threads. A slot may be given to another page while an old copy into it is still queued, so
every copy is filed under its slot, and a slot is settled before it is written again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from fluxmoe.core.copies import Copy, CopyThreads
from fluxmoe.core.store import Store
from fluxmoe.core.types import Bytes, Loads
from fluxmoe.errors import StoreError


class TransferEngine:
    """Copies between one store and the slots of all banks.

    Args:
        store: Where pages come from.
        rows: Per bank and part, the arena as uint8 ``[slots, part bytes]``.
        page_bytes: Bytes of one page, for the counters.
        threads: Copy threads. With 0, prefetches are copied by the caller at once.

    Raises:
        ConfigError: So many threads cannot be started.
    """

    def __init__(
        self,
        store: Store,
        rows: Sequence[Sequence[Bytes]],
        page_bytes: int,
        *,
        threads: int = 1,
    ) -> None:
        self._store, self._rows, self._page_bytes = store, rows, page_bytes
        self._threads = threads
        self._copiers = CopyThreads(threads)
        self._queued: dict[tuple[int, int], Copy] = {}
        self.bytes_demand = self.bytes_prefetch = 0
        self.stall_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether prefetches were queued that nobody has asked for yet."""
        return bool(self._queued)

    def reset(self) -> None:
        """Settle everything and start counting anew."""
        for bank in range(len(self._rows)):
            self.settle_from(bank, 0)
        self.bytes_demand = self.bytes_prefetch = 0
        self.stall_seconds = 0.0

    def demand(self, loads: Loads) -> None:
        """Copy now; when this returns, all pages are in their slots.

        Raises:
            StoreError: A page could not be read; which of the others were is undefined.
        """
        started = time.perf_counter()
        for slot in loads.slots.tolist():
            self._settle(loads.bank, slot)
        pairs = list(zip(loads.pages.tolist(), loads.slots.tolist(), strict=True))
        share = -(-len(pairs) // (self._threads + 1))
        rest = [pairs[i : i + share] for i in range(share, len(pairs), share)]
        others = [(self._copiers.order(partial(self._copy, loads.bank, p)), p) for p in rest]
        try:
            self._copy(loads.bank, pairs[:share])
            for copy, part in others:  # threads that are busy with prefetches do not matter
                if copy.withdraw():
                    self._copy(loads.bank, part)
        finally:
            errors = [copy.error() for copy, _ in others if not copy.withdraw()]
        for error in errors:
            if error is not None:
                raise error
        self.bytes_demand += len(loads) * self._page_bytes
        self.stall_seconds += time.perf_counter() - started

    def prefetch(self, loads: Loads) -> None:
        """Queue copies, in order. A copy that fails is made again when its page is needed."""
        for page, slot in zip(loads.pages.tolist(), loads.slots.tolist(), strict=True):
            self._settle(loads.bank, slot)
            make = partial(self._copy, loads.bank, [(page, slot)])
            if self._threads:
                self._queued[loads.bank, slot] = self._copiers.order(make)
                continue
            try:
                make()
            except StoreError:
                self._queued[loads.bank, slot] = Copy(make)
        self.bytes_prefetch += len(loads) * self._page_bytes

    def complete(self, bank: int, page: int, slot: int) -> None:
        """See that a prefetched page, if it is still on its way, has arrived.

        A copy that no thread has begun, or that failed, is made here and now.

        Raises:
            StoreError: The page could not be read, at the second try either.
        """
        copy = self._queued.pop((bank, slot), None)
        if copy is None:
            return
        started = time.perf_counter()
        if copy.withdraw() or copy.error() is not None:
            self._copy(bank, [(page, slot)])
        self.stall_seconds += time.perf_counter() - started

    def move(self, bank: int, page: int, source: int, target: int) -> None:
        """Copy a resident page from slot ``source`` to slot ``target`` of its bank.

        Raises:
            StoreError: The page was still on its way, and could not be read.
        """
        self._settle(bank, target)
        self.complete(bank, page, source)
        for rows in self._rows[bank]:
            rows[target] = rows[source]

    def settle_from(self, bank: int, first: int) -> None:
        """See that no copy into slots ``first …`` of a bank is under way or queued any more."""
        for key in [key for key in self._queued if key[0] == bank and key[1] >= first]:
            self._settle(*key)

    def close(self) -> None:
        """Stop the copy threads. Idempotent."""
        for bank in range(len(self._rows)):
            self.settle_from(bank, 0)
        self._copiers.close()

    def _settle(self, bank: int, slot: int) -> None:
        """The page on its way to a slot is not wanted there any more."""
        copy = self._queued.pop((bank, slot), None)
        if copy is not None and not copy.withdraw():
            copy.error()  # waits; whether it failed no longer matters

    def _copy(self, bank: int, pairs: Sequence[tuple[int, int]]) -> None:
        parts = self._rows[bank]
        for page, slot in pairs:
            try:
                self._store.read_into(page, [rows[slot] for rows in parts])
            except StoreError:
                raise
            except Exception as error:
                raise StoreError(f"page {page} cannot be read: {error!r}") from error
