"""Time limits for policy calls, and interruption of calls that exceed them.

A call that exceeds the soft limit is counted as slow. The limit is on the processor time of the
calling thread, since on a busy machine any call can be late by the clock. Processor time is costly
to read, so it is measured only for the calls that follow a late one. The hard limit is on wall
time. The watchdog is one thread per process, which sleeps while no call is late. It enforces the
hard limit by raising ``HardLimitExceeded`` in the calling thread. Python delivers the exception
between two bytecode instructions: C code (a NumPy function, a compiled kernel, a system call)
finishes first, and the call still counts as late.

The exception must never reach the code after the call. A lock makes the end of a call and its
interruption mutually exclusive, each call is interrupted at most once, and an interrupted call
withdraws an undelivered exception before returning.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from time import perf_counter_ns, thread_time_ns
from typing import TypeVar
from weakref import WeakSet

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on a policy's faults and call times.

    Attributes:
        strikes: Number of faults after which the policy is disabled for good; also the number of
            slow calls after which a warning is logged.
        soft_s: Seconds of processor time beyond which a call is counted as slow.
        hard_s: Seconds beyond which a call is interrupted, which counts as a fault.
    """

    strikes: int = 16
    soft_s: float = 0.005
    hard_s: float = 2.0


DEFAULT_LIMITS = Limits()

#: Number of calls whose processor time is measured after a call was late by wall time.
_SUSPECTED = 1024


class HardLimitExceeded(BaseException):
    """The exception that interrupts a policy; ``except Exception`` does not catch it."""


class TimeLimiter:
    """Times the calls to one policy, which are made by one thread at a time and never nested.

    Attributes:
        slow: Number of calls that returned, but worked for longer than the soft limit.
    """

    def __init__(self, limits: Limits) -> None:
        self._soft, self._hard = limits.soft_s * 1e9, int(limits.hard_s * 1e9)
        self._suspected = 0
        self._lock = threading.Lock()
        self._started = 0  # 0 = no call is running
        self._thread = 0
        self._fired = self._watched = False
        self.slow = 0

    def call(self, function: Callable[..., R], args: tuple[object, ...]) -> R:
        """Call ``function(*args)``.

        Raises:
            HardLimitExceeded: The call took too long; it was interrupted or returned by itself.
        """
        if not self._watched:
            _watchdog.watch(self)
            self._watched = True
        worked = thread_time_ns() if self._suspected else 0
        try:
            self._thread = get_ident()
            started = self._started = perf_counter_ns()
            try:
                answer = function(*args)
            finally:
                self._stop()
            if self._fired:  # the exception came too late, or the policy caught it
                raise HardLimitExceeded
        except BaseException as error:
            self._stop()  # the first attempt may have been interrupted, but only once
            fired, self._fired = self._fired, False
            if fired and isinstance(error, Exception):
                # Native code that is interrupted in a callback reports an error of its own.
                raise HardLimitExceeded from error
            raise
        if perf_counter_ns() - started > self._soft:
            if self._suspected and thread_time_ns() - worked > self._soft:
                self.slow += 1
            self._suspected = _SUSPECTED
        elif self._suspected:
            self._suspected -= 1
        return answer

    def _stop(self) -> None:
        with self._lock:
            self._started = 0
        if self._fired:
            _raise_in(self._thread, None)

    def due(self, now: int) -> int:
        """Interrupt the current call if it is late; return the ns until the next check is due."""
        started = self._started
        if not started or self._fired:
            return self._hard
        left = started + self._hard - now
        if left > 0:
            return left
        with self._lock:
            # If the same call is still running, the lock keeps it from ending before the exception
            # is set.
            if self._started == started:
                self._fired = True
                _raise_in(self._thread, HardLimitExceeded)
        return self._hard


class _Watchdog:
    """The thread that monitors all time limiters and runs while there are any."""

    def __init__(self) -> None:
        self._limiters: WeakSet[TimeLimiter] = WeakSet()
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._news = threading.Event()

    def watch(self, limiter: TimeLimiter) -> None:
        if self._process != os.getpid():
            self._start()  # forked: the thread is gone and may have held the lock at the fork
        with self._lock:
            self._limiters.add(limiter)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name="fluxmoe-watchdog", daemon=True
                )
                self._thread.start()
        self._news.set()

    def _run(self) -> None:
        while True:
            self._news.clear()
            pause = self._look()
            if pause is None:
                return
            self._news.wait(pause)

    def _look(self) -> float | None:
        """Check all limiters; return the seconds until the next check, or None if none is left."""
        with self._lock:
            limiters = list(self._limiters)
            if not limiters:
                self._thread = None
                return None
        now = perf_counter_ns()
        return min(limiter.due(now) for limiter in limiters) / 1e9


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Make ``thread`` raise ``error`` soon; None withdraws an exception not yet raised."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


_watchdog = _Watchdog()
