"""Streams with controlled timing: work is done as early or as late as allowed, or at random."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: Order in which streams run if several of them can proceed.
#: ``at once``: work is done before the submitting call returns. ``kernels``: the kernels' stream
#: proceeds as long as possible, so that copies run as late as allowed. ``copies``: the reverse.
#: ``random``: any allowed order.
Pace = Literal["at once", "kernels", "copies", "random"]

#: The default stream, to which kernels are submitted.
KERNELS = 0


@dataclass(slots=True)
class Event:
    """An event: how often it was recorded and passed, and the time of the last pass in ms."""

    recorded: int = 0
    passed: int = 0
    at: float = 0.0


@dataclass(slots=True)
class Work:
    """A work item of a stream: it may wait for an event, then runs, then may pass an event."""

    do: Callable[[], float] | None = None
    wait: tuple[Event, int] | None = None
    passes: Event | None = None


class Timeline:
    """Streams and their pending work.

    Args:
        pace: Order of streams.
        seed: Seed for random choices.
    """

    def __init__(self, pace: Pace, seed: int) -> None:
        self.pace = pace
        self._rng = random.Random(seed)
        self._streams: dict[int, deque[Work]] = {KERNELS: deque()}
        self.now = 0.0

    def create(self, stream: int) -> None:
        self._streams[stream] = deque()

    def destroy(self, stream: int) -> None:
        self.finish(stream)
        del self._streams[stream]

    def exists(self, stream: int) -> bool:
        return stream in self._streams

    @property
    def pending(self) -> int:
        """Number of pending work items."""
        return sum(map(len, self._streams.values()))

    @property
    def copying(self) -> bool:
        """True if a stream other than the kernels' has pending work."""
        return any(works for number, works in self._streams.items() if number != KERNELS)

    def give(self, stream: int, work: Work) -> None:
        self._streams[stream].append(work)
        if self.pace == "at once":
            self.finish()

    def record(self, stream: int, event: Event) -> None:
        event.recorded += 1
        self.give(stream, Work(passes=event))

    def wait(self, stream: int, event: Event) -> None:
        """Make a stream wait for the last ``record`` of an event so far, as the driver does."""
        self.give(stream, Work(wait=(event, event.recorded)))

    def finish(self, stream: int | None = None) -> None:
        """Run work until a stream, or every stream, has no pending work."""
        self.until(lambda: not (self.pending if stream is None else self._streams[stream]))

    def until(self, over: Callable[[], bool]) -> None:
        while not over():
            self.step()

    def dawdle(self) -> None:
        """Do a small random amount of work."""
        for _ in range(self._rng.randint(0, 2)):
            if self.pending:
                self.step()

    def step(self) -> None:
        """Run one work item of one stream."""
        able = [number for number, works in self._streams.items() if works and _able(works[0])]
        if not able:
            raise AssertionError(f"deadlock between streams: {self._streams}")
        first = [number for number in able if (number == KERNELS) == (self.pace == "kernels")]
        number = self._rng.choice(able if self.pace == "random" else first or able)
        work = self._streams[number].popleft()
        self.now += work.do() if work.do is not None else 0.001
        if work.passes is not None:
            work.passes.passed += 1
            work.passes.at = self.now


def _able(work: Work) -> bool:
    return work.wait is None or work.wait[0].passed >= work.wait[1]
