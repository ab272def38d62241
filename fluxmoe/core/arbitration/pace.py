"""Pace: when an arbitration policy is asked.

A policy that looks at many steps at once costs hardly more than one that looks at one: between two
steps of the engine its code has left the processor's caches. So it says how often it wants to be
asked, and is shown all the steps since.
"""

from __future__ import annotations

from fluxmoe.core.policy.arbitration import StepSample


class Pace:
    """Counts the steps from one call of a policy to the next.

    Nothing happens while as many requests run, none waits and the policy wants what there is.

    Args:
        interval, calm: ``ArbitrationPolicy.interval`` and ``calm_interval``.
    """

    def __init__(self, interval: int, calm: int) -> None:
        self._interval, self._calm = interval, max(interval, calm)
        self._pause, self._running = 1, 0
        #: Since it was asked last, the oldest first.
        self.steps: list[StepSample] = []

    def due(self, step: StepSample, running: int, waiting: int, *, content: bool) -> bool:
        """Whether to ask now.

        Args:
            step: The one that has just ended.
            running, waiting: Requests of the step that begins.
            content: Whether the policy wanted what there is when it was asked last.
        """
        self.steps.append(step)
        calm = content and not waiting and running == self._running
        return len(self.steps) >= (self._pause if calm else min(self._pause, self._interval))

    def asked(self, running: int, waiting: int, *, content: bool) -> None:
        """It was: with so many requests, and that is what came of it."""
        calm = content and not waiting and running == self._running
        longer = min(2 * self._pause, self._calm) if calm else 0
        self._pause = max(longer, self._interval)
        self._running = running
        self.steps.clear()
