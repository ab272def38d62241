"""ArbitrationGuard: the host's side of an arbitration policy, as ``guard`` is for the others.

A policy that raises, takes too long or answers nonsense changes nothing: the present split stands.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fluxmoe.core.guard import FaultCounter, PolicyGuard
from fluxmoe.core.limits import DEFAULT_LIMITS, Limits
from fluxmoe.core.policy import ArbitrationPolicy, ArbitrationView, Split
from fluxmoe.core.words import line


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
        self._faults.note(attribute, f"is {line(steps, repr)}, not a number of steps")
        return 1

    def split(self, view: ArbitrationView) -> Split:
        """What the policy wants, or the present split after a fault."""
        answer = self._faults.answer("split", self._policy.split, view)
        if answer is None:
            return Split(view.frames)
        reason: object = getattr(answer, "reason", None)
        if type(answer) is Split and answer.frames is view.frames and type(reason) is str:
            return Split(view.frames, line(reason))  # as in most steps
        problem = _problem(answer, reason, view)
        if problem:
            self._faults.note("split", f"gave {problem}")
            return Split(view.frames)
        assert isinstance(answer, Split)
        # It ends in the log, in a message between processes and in a label of a metric.
        return Split({name: int(count) for name, count in answer.frames.items()}, line(reason))


def _problem(answer: object, reason: object, view: ArbitrationView) -> str:
    """What is wrong with an answer; nothing if it can be used."""
    frames: object = getattr(answer, "frames", None)
    if not isinstance(answer, Split) or not isinstance(frames, Mapping):
        return f"{line(answer, repr)}, not a Split"
    if set(frames) != set(view.frames):
        return f"frames for {line(sorted(map(line, frames)))}, not for {sorted(view.frames)}"
    for name, count in frames.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            return f"{line(count, repr)} frames for {name}"
    # The present split is always an answer, even if the limit has just been lowered.
    if sum(frames.values()) > max(view.total_frames, sum(view.frames.values())):
        return f"{line(sum(frames.values()))} frames of {view.total_frames}"
    if not isinstance(reason, str):
        return f"{line(reason, repr)} as a reason"
    return ""
