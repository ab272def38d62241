"""Carriers: what brings pages into slots. Which, and in what order, ``TransferEngine`` says.

Here is the one for memory that the processor writes to; ``streams`` has the one for CUDA devices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from fluxmoe.core.transfer.copies import Copy, CopyThreads
from fluxmoe.core.transfer.store import Store, read
from fluxmoe.core.types import Bytes
from fluxmoe.errors import StoreError

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


class HostCarrier:
    """Copies with the processor: the caller's thread, and copy threads beside it.

    Args:
        store: Where pages come from.
        rows: Per bank and part, the arena as uint8 ``[slots, part bytes]``.
        threads: Copy threads. With 0, prefetches are copied by the caller at once.

    Raises:
        ConfigError: So many threads cannot be started.
    """

    def __init__(self, store: Store, rows: Sequence[Sequence[Bytes]], *, threads: int = 1) -> None:
        self._store, self._rows = store, rows
        self._threads = threads
        self._copiers = CopyThreads(threads)
        self.stall_seconds = 0.0

    def demand(self, bank: int, pairs: Pairs) -> None:
        started = time.perf_counter()
        share = -(-len(pairs) // (self._threads + 1))
        rest = [pairs[i : i + share] for i in range(share, len(pairs), share)]
        others = [(self._copiers.order(partial(self._copy, bank, p)), p) for p in rest]
        try:
            self._copy(bank, pairs[:share])
            for copy, part in others:  # threads that are busy with prefetches do not matter
                if copy.withdraw():
                    self._copy(bank, part)
        finally:
            errors = [copy.error() for copy, _ in others if not copy.withdraw()]
        for error in errors:
            if error is not None:
                raise error
        self.stall_seconds += time.perf_counter() - started

    def prefetch(self, bank: int, pairs: Pairs) -> Sequence[Copy | None]:
        return [self._prefetch(partial(self._copy, bank, [pair])) for pair in pairs]

    def _prefetch(self, make: partial[None]) -> Copy | None:
        if self._threads:
            return self._copiers.order(make)
        try:
            make()
        except StoreError:
            return Copy(make)  # made again when its page is needed
        return None

    def arrive(self, copy: Ordered) -> Exception | None:
        started = time.perf_counter()
        error = copy.error()
        self.stall_seconds += time.perf_counter() - started
        return error

    def move(self, bank: int, source: int, target: int) -> None:
        for rows in self._rows[bank]:
            rows[target] = rows[source]

    def close(self) -> None:
        self._copiers.close()

    def _copy(self, bank: int, pairs: Pairs) -> None:
        parts = self._rows[bank]
        for page, slot in pairs:
            read(self._store, page, [rows[slot] for rows in parts])
