"""The class ``HostCopier``: copies pages into slots in host memory with a pool of threads.

``TransferEngine`` chooses the order of the copies. The copier for CUDA devices is in
``cuda.streams``.

The constructor starts all threads: if a thread were started later and that failed, a job would be
left behind whose slot may since have been assigned to another page. No caller waits for a job
forever, even if the job's thread dies: a job that has not begun can be withdrawn, and a job that
has begun always ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue

from fluxmoe.core.owner import Owner
from fluxmoe.core.transfer.engine import PendingCopy
from fluxmoe.core.transfer.store import BatchStore, Store, reader
from fluxmoe.core.types import Bytes, Loads
from fluxmoe.errors import ConfigError, StoreError
from fluxmoe.words import line

#: Minimum number of bytes to hand to a thread if they need only be copied: waking a thread takes
#: 40 µs.
_SHARE = 1 << 20


class CopyJob:
    """A copy job, which either a thread runs or the caller that ordered the job withdraws."""

    def __init__(self, make: Callable[[], None]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._begun = self._withdrawn = False
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def withdraw(self) -> bool:
        """Cancel the job if no thread has begun it; return True if the job was cancelled."""
        with self._lock:
            self._withdrawn = not self._begun
            return self._withdrawn

    def error(self) -> Exception | None:
        """Wait for the end of a job that has begun; return its error, if any."""
        self._ended.wait()
        if self._error is None or isinstance(self._error, Exception):
            return self._error
        error = StoreError(f"a copy thread was stopped: {line(self._error, repr)}")
        error.__cause__ = self._error
        return error

    def run(self) -> None:
        """Run the job unless it was withdrawn. Copy threads call this method."""
        with self._lock:
            if self._withdrawn:
                return
            self._begun = True
        try:
            self._make()
        except BaseException as error:  # including SystemExit: a caller is waiting
            self._error = error
        self._ended.set()

    def abandon(self) -> None:
        """End the job with an error, because its thread is about to die."""
        if not self._ended.is_set():
            self._error = StoreError("the copy thread died")
            self._ended.set()


class CopyPool:
    """Pool of ``count`` threads, which make copies in the order in which they were requested.

    Raises:
        ConfigError: This many threads cannot be started.
    """

    def __init__(self, count: int) -> None:
        self._orders: SimpleQueue[CopyJob | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._owner = Owner()
        try:
            for number in range(count):
                thread = threading.Thread(
                    target=_work, args=(self._orders,), name=f"fluxmoe-copy-{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise ConfigError(
                f"{count} copy threads cannot be started: {error}",
                where="copy_threads",
                fix="lower it",
            ) from error

    def order(self, copy: CopyJob) -> None:
        """Let a thread run the job. The caller has noted it, in case of an interruption here."""
        self._orders.put(copy)

    def close(self) -> None:
        """Finish all jobs that were not withdrawn, then stop the threads. Idempotent."""
        if not self._owner.here:
            return  # the threads run only in the parent: joining them would block forever
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


def _work(orders: SimpleQueue[CopyJob | None]) -> None:
    copy = None
    try:
        while (copy := orders.get()) is not None:
            copy.run()
    finally:
        if copy is not None:
            copy.abandon()


class HostCopier:
    """A copier that uses the CPU: the caller's thread and copy threads.

    Args:
        store: Source of the pages.
        rows: For each bank and part, the arena as uint8 ``[slots, part bytes]``.
        threads: Number of copy threads; with 0, the caller copies prefetched pages immediately.

    Raises:
        ConfigError: This many threads cannot be started.
    """

    def __init__(self, store: Store, rows: Sequence[Sequence[Bytes]], *, threads: int = 1) -> None:
        self._rows = rows
        self._readers = [reader(store, parts) for parts in rows]
        page_bytes = sum(part.shape[1] for part in rows[0])
        self._least = -(-_SHARE // page_bytes) if isinstance(store, BatchStore) else 1
        self._threads = threads
        self._copiers = CopyPool(threads)
        self.stall_seconds = 0.0

    def demand(self, loads: Loads) -> None:
        started = time.perf_counter()
        share = max(-(-len(loads) // (self._threads + 1)), self._least)
        rest = [loads[i : i + share] for i in range(share, len(loads), share)]
        others = [(CopyJob(partial(self._copy, part)), part) for part in rest]
        try:
            for copy, _ in others:
                self._copiers.order(copy)
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

    def prefetch(self, loads: Loads) -> Iterator[CopyJob | None]:
        for i in range(len(loads)):
            copy = CopyJob(partial(self._copy, loads[i : i + 1]))
            if self._threads:
                yield copy
                self._copiers.order(copy)
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

    def _copy(self, loads: Loads) -> None:
        self._readers[loads.bank](loads.pages, loads.slots)
