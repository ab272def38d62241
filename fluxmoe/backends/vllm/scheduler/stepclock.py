"""How long an engine's steps take, seen from its scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable


class StepClock:
    """The duration of the last step.

    A busy engine's step lasts until the next one begins: scheduling and sampling are part of what
    more requests share. The last step before a rest lasts until its answer is there.

    Args:
        now: Seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._begun = now, -1.0
        self.seconds = 0.0

    def begins(self, *, rested: bool) -> None:
        """A step begins; whether the engine had nothing to do before it."""
        now = self._now()
        if self._begun >= 0 and not rested:
            self.seconds = now - self._begun
        self._begun = now

    def answered(self) -> None:
        """The workers have answered."""
        self.seconds = self._now() - self._begun
