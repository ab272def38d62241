"""ArbitrationGuard: the host's side of an arbitration policy, as ``guard`` is for the others.

A policy that raises, takes too long or answers nonsense changes nothing: the present split stands.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split
from fluxmoe.core.policy.guards import FaultCounter, PolicyGuard
from fluxmoe.core.policy.watchdog import DEFAULT_LIMITS, Limits


class ArbitrationGuard(PolicyGuard):
    """Calls an arbitration policy, validates its answers and contains its faults."""

    def __init__(
        self,
        policy: ArbitrationPolicy,
        *,
        name: str,
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._policy = policy
        super().__init__(FaultCounter("arbitration", name, strict, limits))
        self.fixed = policy.fixed
        self.interval = self._steps("interval")
        self.calm_interval = self._steps("calm_interval")

    def _steps(self, attribute: str) -> int:
        steps: object = getattr(self._policy, attribute)
        if isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1:
            return steps
        self._faults.note(attribute, f"is {steps!r}, not a number of steps")
        return 1

    def split(self, view: ArbitrationView) -> Split:
        """What the policy wants, or the present split after a fault."""
        answer = self._faults.answer("split", self._policy.split, view)
        if answer is None:
            return Split(view.frames)
        if type(answer) is Split and answer.frames is view.frames and type(answer.reason) is str:
            return answer  # as in most steps
        problem = _problem(answer, view)
        if problem:
            self._faults.note("split", f"gave {problem}")
            return Split(view.frames)
        assert isinstance(answer, Split)
        return Split({name: int(count) for name, count in answer.frames.items()}, answer.reason)


def _problem(answer: object, view: ArbitrationView) -> str:
    """What is wrong with an answer; nothing if it can be used."""
    frames: object = getattr(answer, "frames", None)
    if not isinstance(answer, Split) or not isinstance(frames, Mapping):
        return f"{answer!r}, not a Split"
    if set(frames) != set(view.frames):
        return f"frames for {sorted(map(str, frames))}, not for {sorted(view.frames)}"
    for name, count in frames.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            return f"{count!r} frames for {name}"
    # The present split is always an answer, even if the limit has just been lowered.
    if sum(frames.values()) > max(view.total_frames, sum(view.frames.values())):
        return f"{sum(frames.values())} frames of {view.total_frames}"
    reason: object = answer.reason
    if not isinstance(reason, str):
        return f"{reason!r} as a reason"
    return ""
