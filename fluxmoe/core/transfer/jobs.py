"""Jobs and the thread pools that run them: copy threads and read threads.

The constructor of a pool starts all threads of the pool: if a thread failed to start later, its job
would remain queued, although the job's slot might have been assigned to another page. No caller
waits for a job forever, even if the job's thread dies: a job that has not begun can be withdrawn,
and a job that has begun always ends.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from enum import IntEnum
from heapq import heappop, heappush
from queue import SimpleQueue

from fluxmoe.core.owner import Owner
from fluxmoe.errors import ConfigError, StoreError
from fluxmoe.words import line


class Urgency(IntEnum):
    """Priority of a job, most urgent first; equally urgent jobs begin in the order of arrival."""

    DEMAND = 0
    AHEAD = 1


class Job:
    """A job that is either run by a thread or withdrawn by the caller that ordered it.

    Args:
        make: Does the work of the job.
    """

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
        error = StoreError(f"a thread was stopped: {line(self._error, repr)}")
        error.__cause__ = self._error
        return error

    def run(self) -> None:
        """Run the job unless it was withdrawn. The threads of a pool call this method."""
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
            self._error = StoreError("the thread died")
            self._ended.set()


class JobPool:
    """Pool of ``count`` threads, which run jobs in the order of their urgency.

    Args:
        count: Number of threads.
        kind: Kind of the threads, for thread names and error messages.
        where: Setting that determines the number of threads, for error messages.

    Raises:
        ConfigError: This many threads cannot be started.
    """

    def __init__(self, count: int, kind: str, *, where: str) -> None:
        #: A heap of (urgency, number, job). Each access is one call of a C function, so an
        #: interruption by Ctrl-C cannot leave a lock behind.
        self._jobs: list[tuple[Urgency, int, Job]] = []
        self._numbers = itertools.count()
        self._orders: SimpleQueue[bool] = SimpleQueue()  # True for each job; False ends a thread
        self._threads: list[threading.Thread] = []
        self._owner = Owner()
        try:
            for number in range(count):
                name = f"fluxmoe-{kind}-{number}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise ConfigError(
                f"{count} {kind} threads cannot be started: {error}", where=where, fix="lower it"
            ) from error

    def order(self, job: Job, urgency: Urgency) -> None:
        """Let a thread run the job.

        An interruption may leave the job ordered or not, so the caller must already hold a
        reference to the job.
        """
        heappush(self._jobs, (urgency, next(self._numbers), job))
        self._orders.put(True)

    def close(self) -> None:
        """Finish all jobs that were not withdrawn, then stop the threads. Idempotent."""
        if not self._owner.here:
            return  # the threads run only in the parent: joining them would block forever
        for _ in self._threads:
            self._orders.put(False)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self) -> None:
        job: Job | None = None
        try:
            while self._orders.get():
                job = heappop(self._jobs)[-1]
                job.run()
                job = None  # a waiting thread keeps no slot alive
        finally:
            if job is not None:
                job.abandon()
