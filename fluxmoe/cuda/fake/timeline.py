"""Streams that do their work when a test wants it: as soon, as late, or as oddly as is allowed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: Who goes first where several streams could go on.
#: ``at once``: whatever is given is done before the call returns. ``kernels``: the kernels' stream
#: goes on as long as it can, so that copies come as late as they may. ``copies``: the other way
#: round. ``random``: anything that is allowed.
Pace = Literal["at once", "kernels", "copies", "random"]

#: The stream that kernels are given to, unless somebody makes one.
KERNELS = 0


@dataclass(slots=True)
class Event:
    """How often it was recorded and passed, and when it was passed last, in milliseconds."""

    recorded: int = 0
    passed: int = 0
    at: float = 0.0


@dataclass(slots=True)
class Work:
    """What a stream does next: wait for an event, then something, then pass an event."""

    do: Callable[[], float] | None = None
    wait: tuple[Event, int] | None = None
    passes: Event | None = None


class Timeline:
    """Streams and what they have been given to do.

    Args:
        pace: Who goes first.
        seed: Of everything that is left to chance.
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
        """Pieces of work that nobody has done yet."""
        return sum(map(len, self._streams.values()))

    @property
    def copying(self) -> bool:
        """Whether a stream other than the kernels' has something to do."""
        return any(works for number, works in self._streams.items() if number != KERNELS)

    def give(self, stream: int, work: Work) -> None:
        self._streams[stream].append(work)
        if self.pace == "at once":
            self.finish()

    def record(self, stream: int, event: Event) -> None:
        event.recorded += 1
        self.give(stream, Work(passes=event))

    def wait(self, stream: int, event: Event) -> None:
        """As the driver has it: for the last ``record`` before this call."""
        self.give(stream, Work(wait=(event, event.recorded)))

    def finish(self, stream: int | None = None) -> None:
        """Go on until a stream, or all of them, have nothing left to do."""
        self.until(lambda: not (self.pending if stream is None else self._streams[stream]))

    def until(self, over: Callable[[], bool]) -> None:
        while not over():
            self.step()

    def dawdle(self) -> None:
        """Some time passes."""
        for _ in range(self._rng.randint(0, 2)):
            if self.pending:
                self.step()

    def step(self) -> None:
        """One stream does one thing."""
        able = [number for number, works in self._streams.items() if works and _able(works[0])]
        if not able:
            raise AssertionError(f"streams wait for each other for ever: {self._streams}")
        first = [number for number in able if (number == KERNELS) == (self.pace == "kernels")]
        number = self._rng.choice(able if self.pace == "random" else first or able)
        work = self._streams[number].popleft()
        self.now += work.do() if work.do is not None else 0.001
        if work.passes is not None:
            work.passes.passed += 1
            work.passes.at = self.now


def _able(work: Work) -> bool:
    return work.wait is None or work.wait[0].passed >= work.wait[1]
