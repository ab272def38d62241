"""Many runs, sequential or in parallel threads, and the shrinking of failures."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fluxmoe.testing.faults import FaultPlan
from tests.core.rig import Leaks
from tests.fuzz.run import Run


@dataclass
class Tally:
    """Counts of operations, summed over runs."""

    runs: int = 0
    operations: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, run: Run) -> None:
        self.runs += 1
        self.operations += run.operations
        self.calls += run.calls
        self.faults += run.faults
        self.errors += run.errors


class Failure(AssertionError):
    """The failure of a run; the message contains the command that repeats the failure."""

    def __init__(
        self, seed: int, operations: int, error: BaseException, *, gpu: bool = False
    ) -> None:
        self.seed, self.operations = seed, operations
        super().__init__(
            f"{type(error).__name__}: {error}\n"
            f"replay: python -m tests.fuzz --seed {seed} --ops {operations}{' --gpu' * gpu}"
        )


def attempt(seed: int, operations: int, *, gpu: bool = False) -> Run:
    """Make one run, close it and check for leaks; raise any failure."""
    leaks = Leaks()
    run = Run(seed, gpu=gpu)
    try:
        run.go(operations)
    except BaseException:
        with suppress(Exception):  # closing a broken run may fail, too
            run.close()
        raise
    run.close()
    leaks.assert_none()
    return run


def fuzz(seeds: Iterable[int], operations: int, *, gpu: bool = False) -> Tally:
    """Make one run of ``operations`` operations per seed.

    Raises:
        Failure: A run fails; the error describes the shortest failing prefix.
    """
    tally = Tally()
    for seed in seeds:
        try:
            tally.add(attempt(seed, operations, gpu=gpu))
        except Exception as error:
            shortest, error = shrink(seed, operations, error, gpu=gpu)
            raise Failure(seed, shortest, error, gpu=gpu) from error
    return tally


def shrink(
    seed: int, operations: int, error: Exception, *, gpu: bool = False
) -> tuple[int, Exception]:
    """Find the shortest failing prefix and its error by bisection.

    Every prefix ends with a complete check, so a short prefix may detect a problem earlier than the
    whole run.
    """
    passes, fails = 0, operations
    while fails - passes > 1:
        middle = (passes + fails) // 2
        try:
            attempt(seed, middle, gpu=gpu)
            passes = middle
        except Exception as found:
            fails, error = middle, found
    return fails, error


# --- side by side ---------------------------------------------------------------------------------


class Dawdling(FaultPlan):
    """A plan that causes no failures, but delays every read by a different time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(seed)

    def reach(self, site: str) -> None:
        if site == "read":
            time.sleep(self._rng.choice([0, 0, 0, 1e-5, 2e-4]))


def together(seeds: Iterable[int], operations: int, *, threads: int = 2) -> Tally:
    """Run one engine per seed, each on its own thread with its own copy threads, and run watchers.

    The engines share the process: compiled code, watchdog, address space and descriptors. The
    watchers read data while a step is running, as a metrics endpoint does.
    """
    leaks = Leaks()
    runs = {seed: Run(seed, plan=Dawdling(seed), threads=threads) for seed in seeds}
    errors: list[BaseException] = []
    over = threading.Event()

    def guarded(seed: int, work: Callable[[], None]) -> threading.Thread:
        def body() -> None:
            try:
                work()
            except Exception as error:
                error.add_note(f"in one of several engines, seed {seed}: {runs[seed].name}")
                errors.append(error)

        return threading.Thread(target=body)

    engines = [guarded(seed, lambda run=run: run.go(operations)) for seed, run in runs.items()]
    watchers = [guarded(seed, lambda run=run: _watch(run, over)) for seed, run in runs.items()]
    with _switching_often():
        for thread in watchers + engines:
            thread.start()
        for engine in engines:
            engine.join()
        over.set()
        for watcher in watchers:
            watcher.join()
    tally = Tally()
    for run in runs.values():
        run.close()
        tally.add(run)
    if errors:
        raise errors[0]
    leaks.assert_none()
    return tally


def _watch(run: Run, over: threading.Event) -> None:
    rig, pages = run.rig, run.rig.geometry.num_pages
    while not over.wait(1e-4):
        counters, frames = rig.pager.counters(), rig.memory.frames()
        assert min(counters.events, counters.hits, counters.misses) >= 0
        assert 0 <= sum(frames.values()) <= rig.memory.pool.count
        assert 0 <= rig.memory.committed_bytes <= rig.memory.budget_bytes
        assert 0 <= rig.table.resident.sum() <= pages
        assert rig.transfer.stall_seconds >= 0
        run.calls["watch"] += 1


@contextmanager
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
