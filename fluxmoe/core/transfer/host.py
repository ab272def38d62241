"""The class ``HostCopier``: copies pages into slots in host memory with a pool of threads.

``TransferEngine`` chooses the order of the copies. The copier for CUDA devices is in
``cuda.streams``.

A store with read threads (``AheadStore``) gets prefetches immediately, regardless of the number of
copy threads. The copy threads complete the pages that have been read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from fluxmoe.core.transfer.engine import PendingCopy
from fluxmoe.core.transfer.jobs import Job, JobPool, Urgency
from fluxmoe.core.transfer.store import BatchStore, Read, Store, ahead, reader
from fluxmoe.core.types import Bytes, Loads
from fluxmoe.errors import StoreError

#: Minimum number of bytes to hand to a thread if the store reads many pages in one call: waking a
#: thread takes 40 µs.
_SHARE = 1 << 20


class ReadJob(Job):
    """A job that completes a page that is read by the store's read threads.

    If the page is needed before a thread has begun the job, the caller completes the page.
    """

    def __init__(self, read: Read) -> None:
        super().__init__(read.finish)
        self._read = read

    def withdraw(self) -> bool:
        with self._lock:
            self._withdrawn = not self._begun and self._read.withdraw()
            return self._withdrawn

    def error(self) -> Exception | None:
        with self._lock:
            here = self._withdrawn = not self._begun
        if here:
            try:
                self._read.finish()
            except Exception as failure:
                return failure
            return None
        error = super().error()
        if error is not None:
            self._read.settle()  # the job's thread may have died while the page was being read
        return error


class HostCopier:
    """A copier that uses the CPU: the caller's thread and copy threads.

    Args:
        store: Source of the pages.
        rows: For each bank and part, the arena as uint8 ``[slots, part bytes]``.
        threads: Number of copy threads. With 0, the caller copies prefetched pages immediately; if
            the store's read threads read them, the caller completes them when they are needed.

    Raises:
        ConfigError: This many threads cannot be started.
    """

    def __init__(self, store: Store, rows: Sequence[Sequence[Bytes]], *, threads: int = 1) -> None:
        self._rows: Sequence[Sequence[Bytes]] = rows
        self._readers = [reader(store, parts) for parts in rows]
        self._ahead = [ahead(store, parts) for parts in rows]
        page_bytes = sum(part.shape[1] for part in rows[0])
        self._least = -(-_SHARE // page_bytes) if isinstance(store, BatchStore) else 1
        self._threads = threads
        self._copiers = JobPool(threads, "copy", where="copy_threads")
        self.stall_seconds = 0.0

    def demand(self, loads: Loads) -> None:
        started = time.perf_counter()
        share = max(-(-len(loads) // (self._threads + 1)), self._least)
        rest = [loads[i : i + share] for i in range(share, len(loads), share)]
        others = [(Job(partial(self._copy, part)), part) for part in rest]
        try:
            for copy, _ in others:
                self._copiers.order(copy, Urgency.DEMAND)
            self._copy(loads[:share])
            for copy, part in others:  # do not wait for threads that are busy with prefetches
                if copy.withdraw():
                    self._copy(part)
        finally:
            errors = [copy.error() for copy, _ in others if not copy.withdraw()]
        for error in errors:
            if error is not None:
                raise error
        self.stall_seconds += time.perf_counter() - started

    def prefetch(self, loads: Loads) -> Iterator[Job | None]:
        for i, (page, slot) in enumerate(loads.pairs):
            read = self._ahead[loads.bank](page, slot)
            copy = ReadJob(read) if read else Job(partial(self._copy, loads[i : i + 1]))
            if self._threads or read:
                yield copy
                if read:
                    read.begin(Urgency.AHEAD)
                if self._threads:
                    self._copiers.order(copy, Urgency.AHEAD)
                continue
            try:
                self._copy(loads[i : i + 1])
            except StoreError:
                yield copy  # not begun, so the copy is repeated when its page is needed
            else:
                yield None

    def arrive(self, copy: PendingCopy) -> Exception | None:
        started = time.perf_counter()
        error = copy.error()
        self.stall_seconds += time.perf_counter() - started
        return error

    def move(self, bank: int, source: int, target: int) -> None:
        for rows in self._rows[bank]:
            rows[target] = rows[source]

    def close(self) -> None:
        self._copiers.close()
        self._rows, self._readers, self._ahead = [], [], []  # views of the arenas

    def _copy(self, loads: Loads) -> None:
        self._readers[loads.bank](loads.pages, loads.slots)
