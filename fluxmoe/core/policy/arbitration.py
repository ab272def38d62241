"""The contract of arbitration policies: what they see between two steps, and what they answer.

The same rules hold as for the policies of ``paging``: nothing that is shown can be written to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fluxmoe.core.policy.paging import read_only
from fluxmoe.core.types import Budget


@dataclass(frozen=True, slots=True)
class Split:
    """How many frames each tenant should own.

    Attributes:
        frames: Tenant (``experts``, ``kv``) → frames, together at most ``view.total_frames``.
        reason: The numbers that led to it, for the log.
    """

    frames: Mapping[str, int]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ExpertDemand:
    """What expert pages cost at present.

    Attributes:
        frames: Frames per page: ``frames × pages`` hold all experts.
        pages: Pages of the model.
        accesses: Distinct experts that a step uses, over all layers.
        misses: How many of them were not resident.
        loads: Pages copied, prefetched ones included.
        load_seconds: Time to load one page, as measured; 0 before one was.
        curve: float64, miss ratio with slots at equal distances from none to ``pages``; empty
            before anything was sampled. It is the convex hull of LRU's, first uses left out: what
            a policy that suits the workload comes close to (``core.paging.measures``).
    """

    frames: float = 0.0
    pages: int = 0
    accesses: float = 0.0
    misses: float = 0.0
    loads: float = 0.0
    load_seconds: float = 0.0
    curve: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        _lock_curve(self)

    def miss_ratio(self, frames: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The curve at that many frames, one number or many; zero before anything is known."""
        return _at(self.curve, np.asarray(frames, np.float64), self.frames * self.pages)


@dataclass(frozen=True, slots=True)
class PrefixDemand:
    """What is asked of the prefix cache.

    Attributes:
        asked: Tokens of the prompts that were looked up, since the start.
        found: How many of them were there, and need not be computed.
        frames: The prefix cache at the curve's end.
        curve: float64, share of the prompts' blocks that are found with prefix caches at equal
            distances from none to ``frames``; KV cache that requests use comes on top. Empty before
            anything was asked (``core.arbitration.prefixes``).
    """

    asked: int = 0
    found: int = 0
    frames: float = 0.0
    curve: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        _lock_curve(self)

    def hit_ratio(self, frames: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The curve with so much KV cache that no request uses; zero before anything is known."""
        return _at(self.curve, np.asarray(frames, np.float64), self.frames)


def _lock_curve(demand: ExpertDemand | PrefixDemand) -> None:
    """Nothing that a policy is shown can be written to."""
    if demand.curve.flags.writeable:
        object.__setattr__(demand, "curve", read_only(demand.curve))


def _at(
    curve: npt.NDArray[np.float64], asked: npt.NDArray[np.float64], end: float
) -> npt.NDArray[np.float64]:
    """A curve from 0 to ``end`` at the numbers asked for."""
    steps = len(curve) - 1
    if steps < 1 or not end:
        return np.zeros_like(asked)
    values: npt.NDArray[np.float64] = np.interp(asked * (steps / end), np.arange(steps + 1), curve)
    return values


class StepSample(NamedTuple):
    """One step of the engine, as ``ArbitrationView`` tells of the last one.

    Attributes:
        requests: How many ran in it.
        tokens: Computed in it.
        seconds, stall_seconds: Its duration, and the part of it that layers waited for pages.
        accesses, misses: See ``ExpertDemand``.
    """

    requests: int
    tokens: int
    seconds: float
    stall_seconds: float = 0.0
    accesses: float = 0.0
    misses: float = 0.0


@dataclass(frozen=True, slots=True)
class ArbitrationView:
    """What an arbitration policy may see between two steps. Nothing in it changes.

    Attributes:
        frames: Tenant → frames it owns.
        total_frames: The budget.
        bounds: Tenant → what it must and may have (``target`` is what it started with).
        step: Steps so far.
        waiting_requests, running_requests: In the engine's queues.
        max_running_requests: What the engine allows to run at once.
        kv_used_frames: KV cache in use by requests, without merely cached blocks.
        request_frames: KV cache that a request needs at its end, as far as can be foreseen from
            the prompts that are known and from how long answers have become; 0 before one ended.
        kv_cached_frames: KV cache that only holds prefixes nobody uses at present.
        preemptions: Requests that lost their KV cache because it was full, since the start.
        tokens: Tokens computed in the last step.
        step_seconds: Duration of the last step.
        stall_seconds: The part of it that layers waited for pages.
        steps: All steps since the policy was asked last, the oldest first.
        experts: What expert pages cost.
        prefixes: What the prefix cache is asked for.
    """

    frames: Mapping[str, int]
    total_frames: int
    bounds: Mapping[str, Budget] = field(default_factory=dict)
    step: int = 0
    waiting_requests: int = 0
    running_requests: int = 0
    max_running_requests: int = 0
    kv_used_frames: int = 0
    request_frames: float = 0.0
    kv_cached_frames: int = 0
    preemptions: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    stall_seconds: float = 0.0
    steps: tuple[StepSample, ...] = ()
    experts: ExpertDemand = ExpertDemand()
    prefixes: PrefixDemand = PrefixDemand()

    def __post_init__(self) -> None:
        for name in ("frames", "bounds"):
            given = getattr(self, name)
            if not isinstance(given, MappingProxyType):
                object.__setattr__(self, name, MappingProxyType(dict(given)))


class ArbitrationPolicy(ABC):
    """Decides how the budget is split between tenants, between steps.

    Attributes:
        fixed: The split never changes: the policy is never asked, nothing is reserved for growth.
        interval: Steps from one call to the next; ``view.steps`` has them all.
        calm_interval: The same after a while in which as many requests run, none waits and the
            policy wants no other split than the present one. If anything of that ends, the policy
            is asked within ``interval``.
    """

    fixed: ClassVar[bool] = False
    interval: int = 1
    calm_interval: int = 1

    @abstractmethod
    def split(self, view: ArbitrationView) -> Split:
        """The split wanted from now on; returning the present one is the normal answer.

        Asked every ``interval`` steps, while frames are moving, too; until then the last answer
        stands. The host keeps to the bounds, never takes KV cache that is in use, and moves a
        limited number of frames per step.
        """

    def reset(self) -> None:
        """Forget everything."""
