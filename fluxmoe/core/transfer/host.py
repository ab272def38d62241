"""HostCarrier: brings pages into slots of memory that the processor writes to.

Which, and in what order, ``TransferEngine`` says. The carrier for CUDA devices is in
``cuda.streams``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from fluxmoe.core.transfer.copies import Copy, CopyThreads
from fluxmoe.core.transfer.engine import Ordered, Pairs
from fluxmoe.core.transfer.store import Store, read
from fluxmoe.core.types import Bytes
from fluxmoe.errors import StoreError


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
