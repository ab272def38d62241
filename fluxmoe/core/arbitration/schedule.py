"""AskingSchedule, which determines the steps in which an arbitration policy is called."""

from __future__ import annotations

from fluxmoe.core.policy.arbitration import StepSample


class AskingSchedule:
    """Counts the steps between two calls to a policy.

    Evaluating many steps at once costs little more than evaluating one, because the policy's code
    leaves the CPU caches between engine steps. So a policy declares the interval between calls and
    receives all steps since the last call.

    Calls become rarer while the number of running requests is constant, no request waits and the
    policy keeps the current split.

    Args:
        interval, calm: ``ArbitrationPolicy.interval`` and ``calm_interval``.
    """

    def __init__(self, interval: int, calm: int) -> None:
        self._interval, self._calm = interval, max(interval, calm)
        self._pause, self._running = 1, 0
        #: Steps since the last call to the policy, oldest first.
        self.steps: list[StepSample] = []

    def due(self, step: StepSample, running: int, waiting: int, *, content: bool) -> bool:
        """Return True if the policy should be called now.

        Args:
            step: The step that has just ended.
            running, waiting: Numbers of requests in the step that is about to begin.
            content: True if the policy's last answer was the current split.
        """
        self.steps.append(step)
        calm = content and not waiting and running == self._running
        return len(self.steps) >= (self._pause if calm else min(self._pause, self._interval))

    def asked(self, running: int, waiting: int, *, content: bool) -> None:
        """Record a call to the policy, with arguments as for ``due``."""
        calm = content and not waiting and running == self._running
        longer = min(2 * self._pause, self._calm) if calm else 0
        self._pause = max(longer, self._interval)
        self._running = running
        self.steps.clear()
