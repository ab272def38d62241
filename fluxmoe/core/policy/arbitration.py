"""The contract of arbitration policies: their input between two steps, and their answers.

All input is read-only, as in ``paging``, and shares no memory with the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fluxmoe.core.policy.paging import own
from fluxmoe.core.types import Budget


@dataclass(frozen=True, slots=True)
class Split:
    """Number of frames that each tenant should own.

    Attributes:
        frames: Tenant (``experts``, ``kv``) → frames; the sum is at most ``view.total_frames``.
        reason: Explanation with the relevant numbers, for the log.
    """

    frames: Mapping[str, int]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ExpertDemand:
    """Current demand for expert pages, and its cost.

    Attributes:
        frames: Frames per page; ``frames × pages`` frames hold all experts.
        pages: Number of the model's pages.
        accesses: Number of distinct experts that a step used, summed over all layers.
        misses: Number of these experts that were not resident.
        loads: Number of pages copied, including prefetched ones.
        load_seconds: Measured time to load one page; 0 before the first load.
        curve: float64, miss ratio at equally spaced numbers of slots from 0 to ``pages``; empty
            before the first sample. The curve is the convex hull of LRU's curve, without first
            uses; a suitable policy comes close to it (``core.paging.measures``).
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
        """Return the miss ratio at ``frames``, a number or an array; 0 before the first sample."""
        return _at(self.curve, np.asarray(frames, np.float64), self.frames * self.pages)


@dataclass(frozen=True, slots=True)
class PrefixDemand:
    """Demand for cached prefixes.

    Attributes:
        asked: Number of prompt tokens looked up since startup.
        found: Number of these tokens that were cached and need not be computed.
        frames: Frames of the prefix cache at the end of the curve.
        curve: float64, hit ratio of prompt blocks at equally spaced sizes of the prefix cache from
            0 to ``frames``, which exclude the KV cache that requests use. Empty before the first
            lookup (``core.arbitration.prefixes``).
    """

    asked: int = 0
    found: int = 0
    frames: float = 0.0
    curve: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        _lock_curve(self)

    def hit_ratio(self, frames: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the hit ratio with ``frames`` that no request uses; 0 before the first lookup."""
        return _at(self.curve, np.asarray(frames, np.float64), self.frames)


def _lock_curve(demand: ExpertDemand | PrefixDemand) -> None:
    """Replace the curve with a read-only copy, since all input to policies is read-only."""
    object.__setattr__(demand, "curve", own(demand.curve))


def _at(
    curve: npt.NDArray[np.float64], asked: npt.NDArray[np.float64], end: float
) -> npt.NDArray[np.float64]:
    """Interpolate a curve that extends from 0 to ``end`` at the points ``asked``."""
    steps = len(curve) - 1
    if steps < 1 or not end:
        return np.zeros_like(asked)
    values: npt.NDArray[np.float64] = np.interp(asked * (steps / end), np.arange(steps + 1), curve)
    return values


class StepSample(NamedTuple):
    """One step of the engine.

    Attributes:
        requests: Number of requests that ran.
        tokens: Number of tokens computed.
        seconds, stall_seconds: Duration of the step, and the part spent waiting for pages.
        accesses, misses: As in ``ExpertDemand``.
    """

    requests: int
    tokens: int
    seconds: float
    stall_seconds: float = 0.0
    accesses: float = 0.0
    misses: float = 0.0


@dataclass(frozen=True, slots=True)
class ArbitrationView:
    """Input to an arbitration policy between two steps. Immutable.

    Attributes:
        frames: Tenant → number of frames that the tenant owns.
        total_frames: Budget in frames.
        bounds: Tenant → minimum and maximum in frames (``target`` is the initial number).
        step: Number of steps so far.
        waiting_requests, running_requests: Number of requests in the engine's queues.
        max_running_requests: Maximum number of requests that the engine runs at once.
        kv_used_frames: Frames of KV cache that requests use, without blocks that are only cached.
        request_frames: Frames of KV cache that a request needs at its end, estimated from known
            prompts and the lengths of past answers; 0 until the first request has finished.
        kv_cached_frames: Frames of KV cache that hold only prefixes that no request now uses.
        preemptions: Number of times since startup that a request lost its KV cache because the
            cache was full.
        tokens: Number of tokens computed in the last step.
        step_seconds: Duration of the last step.
        stall_seconds: Part of ``step_seconds`` spent waiting for pages.
        steps: All steps since the policy was last called, oldest first.
        experts: Demand for expert pages.
        prefixes: Demand for cached prefixes.
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
    """Decides on the split of the budget, between steps.

    Attributes:
        fixed: True if the split never changes: the policy is never called, and nothing is reserved
            for growth.
        interval: Number of steps between calls; ``view.steps`` contains all of these steps.
        calm_interval: The same while the number of running requests is constant, no request is
            waiting and the policy keeps the current split. When one of these conditions ends,
            the policy is called within ``interval`` steps.
    """

    fixed: ClassVar[bool] = False
    interval: int = 1
    calm_interval: int = 1

    @abstractmethod
    def split(self, view: ArbitrationView) -> Split:
        """Return the split to aim for; the current split is the normal answer.

        The host calls this method every ``interval`` steps, even while frames are moving; each
        answer stands until the next call. The host enforces the bounds, never takes away KV
        cache in use, and moves a limited number of frames per step.
        """

    def reset(self) -> None:
        """Clear all state."""
