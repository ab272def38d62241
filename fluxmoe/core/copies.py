"""Copies in the background: threads that take one job after the other, and jobs one can take back.

All threads run from the start: one that cannot be started later would leave a job behind whose slot
has long been given to another page. Whatever happens to a thread, nobody waits for its job for
ever: a job that no thread has begun can be withdrawn, and one that was begun always ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from fluxmoe.core.owner import Owner
from fluxmoe.core.words import line
from fluxmoe.errors import ConfigError, StoreError


class Copy:
    """One job. Either a thread makes it, or whoever ordered it withdraws it."""

    def __init__(self, make: Callable[[], None]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._begun = self._withdrawn = False
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def withdraw(self) -> bool:
        """Whether no thread has begun it; then none will."""
        with self._lock:
            self._withdrawn = not self._begun
            return self._withdrawn

    def error(self) -> Exception | None:
        """Wait for the end of a job that was begun; what went wrong, if anything."""
        self._ended.wait()
        if self._error is None or isinstance(self._error, Exception):
            return self._error
        error = StoreError(f"a copy thread was stopped: {line(self._error, repr)}")
        error.__cause__ = self._error
        return error

    def run(self) -> None:
        """Make it, unless it was withdrawn. Called by a copy thread."""
        with self._lock:
            if self._withdrawn:
                return
            self._begun = True
        try:
            self._make()
        except BaseException as error:  # not even SystemExit may pass: somebody waits
            self._error = error
        self._ended.set()

    def abandon(self) -> None:
        """The thread that had it is about to die."""
        if not self._ended.is_set():
            self._error = StoreError("the copy thread died")
            self._ended.set()


class CopyThreads:
    """``count`` threads that make copies in the order in which they were ordered.

    Raises:
        ConfigError: So many threads cannot be started.
    """

    def __init__(self, count: int) -> None:
        self._orders: SimpleQueue[Copy | None] = SimpleQueue()
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

    def order(self, make: Callable[[], None]) -> Copy:
        copy = Copy(make)
        self._orders.put(copy)
        return copy

    def close(self) -> None:
        """Let the threads make what was ordered and not withdrawn, and end. Idempotent."""
        if not self._owner.here:
            return  # they run in the parent only, and could be waited for without end
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


def _work(orders: SimpleQueue[Copy | None]) -> None:
    copy = None
    try:
        while (copy := orders.get()) is not None:
            copy.run()
    finally:
        if copy is not None:
            copy.abandon()
