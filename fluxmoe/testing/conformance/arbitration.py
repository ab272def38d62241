"""The contract of arbitration policies, as tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fluxmoe.core.policy.arbitration import (
    ArbitrationPolicy,
    ArbitrationView,
    ExpertDemand,
    PrefixDemand,
    Split,
    StepSample,
)
from fluxmoe.core.types import Budget
from fluxmoe.testing.conformance.audit import AuditedArbitration, gather
from fluxmoe.testing.conformance.common import (
    FAST,
    Tried,
    check_signatures,
    first_rules,
    same_again,
)
from fluxmoe.testing.conformance.report import Broken, Finding, Rule, raise_broken, try_rules
from fluxmoe.words import line

Factory = Callable[[], ArbitrationPolicy]
Frames = tuple[int, int]


def check_arbitration_policy(factory: Factory) -> None:
    """Test an arbitration policy against its contract.

    Args:
        factory: The policy's class, or a function that makes a new policy each time.

    Raises:
        ConformanceError: A rule is broken; the message gives the rule, the call and the remedy.
    """
    raise_broken("an arbitration policy does not conform", findings, factory)


def findings(factory: Factory) -> list[Finding]:
    """Test every rule and return the results."""
    return try_rules(
        RULES, Tried(factory, ArbitrationPolicy, PolicyRun, DAYS, "frames for KV", "step")
    )


@dataclass(frozen=True, slots=True)
class Day:
    """A budget and the engine's state, step by step.

    Attributes:
        name: Name for messages.
        total: Number of frames in the budget.
        experts, kv: Bounds of the tenants in frames; both tenants start at their ``target``.
        steps: The engine's view in each step, to which a run adds frames and bounds.
    """

    name: str
    total: int
    experts: Budget
    kv: Budget
    steps: tuple[ArbitrationView, ...]

    def __str__(self) -> str:
        return f"scripted day {self.name!r}"


def _steps(total: int, count: int = 240) -> Iterator[ArbitrationView]:
    """Yield views: nothing measured, one request, a queue, preemptions, only prefixes, and idle."""
    rng = np.random.default_rng(7)
    demand = ExpertDemand(frames=total / 100, pages=80)
    preemptions = hits = 0
    curve, prefixes = np.zeros(0), np.linspace(0.0, 0.9, 65)
    for step in range(count):
        part = step * 6 // count
        busy = part in (1, 2, 3)
        running = (0, 1, 8, 8, 0, 0)[part]
        waiting = (0, 0, 12, 30, 0, 0)[part]
        preemptions += int(part == 3 and step % 3 == 0)
        hits += 16 * (part == 2)
        if step == count // 4:
            curve = np.linspace(1.0, 0.0, 33) ** 2
        seconds = float(0.01 + 0.002 * rng.random()) * (running or 1) if step else 0.0
        stall = seconds * (0.0, 0.6, 0.3, 0.1, 0.0, 0.0)[part]
        yield ArbitrationView(
            frames={},
            total_frames=0,
            step=step,
            waiting_requests=waiting,
            running_requests=running,
            max_running_requests=8,
            kv_used_frames=total * (0, 1, 4, 6, 0, 0)[part] // 16,
            kv_cached_frames=total * (0, 0, 1, 1, 5, 0)[part] // 16,
            preemptions=preemptions,
            tokens=running if busy else 0,
            prefixes=PrefixDemand(2 * hits, hits, float(total), prefixes if hits else np.zeros(0)),
            step_seconds=seconds,
            stall_seconds=stall,
            steps=(
                StepSample(running, running * busy, seconds, stall, 8.0 * running, 2.0 * running),
            ),
            experts=replace(
                demand,
                accesses=float(8 * running),
                misses=float(2 * running),
                loads=float(2 * running),
                load_seconds=0.001 if busy else 0.0,
                curve=curve,
            ),
        )


DAYS: tuple[Day, ...] = (
    Day("wide", 1000, Budget(100, 600, 950), Budget(50, 400, 900), tuple(_steps(1000))),
    Day("tight", 64, Budget(40, 40, 41), Budget(23, 24, 24), tuple(_steps(64))),
    Day("few frames", 2, Budget(1, 1, 1), Budget(1, 1, 1), tuple(_steps(2, 60))),
    # The operator has lowered the limit: the tenants initially own more than the total.
    Day("lowered", 500, Budget(100, 600, 950), Budget(50, 400, 900), tuple(_steps(1000))),
)


class PolicyRun:
    """A day in progress, which approaches a policy's split in small moves, as the engine does."""

    def __init__(self, day: Day, policy: ArbitrationPolicy) -> None:
        self._day, self._policy = day, policy
        self.guard = AuditedArbitration(policy, str(day))
        self._wanted = np.zeros(len(day.steps), np.int32)
        self._at, self._frames = 0, (day.experts.target, day.kv.target)

    def run(self, share: float = 1.0) -> npt.NDArray[np.int32]:
        """Run up to ``share`` of the day; return the requested KV cache frames per step."""
        day, end = self._day, round(share * len(self._day.steps))
        for step in range(self._at, end):
            experts, kv = self._frames
            view = replace(
                day.steps[step],
                frames={"experts": experts, "kv": kv},
                total_frames=day.total,
                bounds={"experts": day.experts, "kv": day.kv},
            )
            split = self.guard.split(view)
            self._wanted[step] = split.frames["kv"]
            self._frames = self._moved(split, view.kv_used_frames)
        self._at = end
        return self._wanted

    def _moved(self, split: Split, used: int) -> Frames:
        """Return the frames after a move of at most 1/16 of the budget, within the bounds."""
        day, (experts, kv) = self._day, self._frames
        most = max(1, day.total // 16)
        floor = max(day.kv.min, min(used, kv))
        wanted = min(max(split.frames["kv"], floor), day.kv.max, day.total - day.experts.min)
        kv += min(max(wanted - kv, -most), most)
        room = min(max(split.frames["experts"], day.experts.min), day.experts.max, day.total - kv)
        return max(experts + min(max(room - experts, -most), most), day.experts.min), kv

    def restart(self) -> None:
        """Call the policy's ``reset()`` and restart at the first step."""
        self.guard.auditor.contain("reset")
        self._wanted = np.zeros_like(self._wanted)
        self._at, self._frames = 0, (self._day.experts.target, self._day.kv.target)


def _declares(tried: Tried[ArbitrationPolicy, Day, PolicyRun]) -> str | None:
    policy = tried.new()
    check_signatures(policy, ArbitrationPolicy, {"split": ("view",), "reset": ()})
    if not isinstance(policy.fixed, bool):
        raise Broken(
            f"fixed is {line(policy.fixed, repr)}", mend="set it to True or False in the class"
        )
    for name in ("interval", "calm_interval"):
        steps = getattr(policy, name)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise Broken(
                f"{name} is {line(steps, repr)}", mend="set it to a number of steps, 1 or more"
            )
    return None


def _answers(tried: Tried[ArbitrationPolicy, Day, PolicyRun]) -> str | None:
    auditors = []
    for day in DAYS:
        run = tried.play(day)
        run.run()
        auditors.append(run.guard.auditor)
    tried.seen = gather(auditors)
    return None


RULES: list[Rule[Tried[ArbitrationPolicy, Day, PolicyRun]]] = [
    *first_rules("arbitration", _declares, _answers, "in every state of the engine"),
    *same_again("the same day leads to the same splits"),
    FAST,
]
