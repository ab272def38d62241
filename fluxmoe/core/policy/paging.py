"""The three contracts that a policy can fulfil, and the read-only view it decides from.

A policy holds no copy of what the host keeps: recency, frequency and residency are in the view, as
numpy arrays over all pages, and a policy answers with arrays. Three lines make a policy::

    class MostRecentlyUsed(fluxmoe.EvictionPolicy):
        def score(self, view, pages):
            return -view.last_use[pages]

The host validates every answer and contains faults (see ``guard``); policies need no defence.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fluxmoe.core.types import Access, Bools, Budget, Int64s

if TYPE_CHECKING:
    from fluxmoe.core.paging.table import PageTable

T = TypeVar("T", bound=np.generic)

ScoreKernel = Callable[..., float]


class PageView:
    """What an eviction or prefetch policy may see: arrays over all pages, read-only.

    Attributes:
        last_use: int64 ``[pages]``, event in which the page was last routed to, −1 = never.
        use_count: int64 ``[pages]``, events it was routed to; survives eviction.
        loaded_at: int64 ``[pages]``, event in which it last got a slot, −1 = never.
        next_use: int64 ``[pages]``, next event that routes to it; simulator only, for oracles
            (``needs_future``). ``NO_NEXT_USE`` if there is none.
        num_layers, experts_per_layer, slots: geometry, and usable slots over all banks.
        rng: The only randomness a policy may use, seeded.
    """

    NO_NEXT_USE: ClassVar[int] = np.iinfo(np.int64).max

    last_use: Int64s
    use_count: Int64s
    loaded_at: Int64s
    #: ``next_use`` as the simulator keeps it up to date; for the host only.
    future: Int64s | None
    num_layers: int
    experts_per_layer: int
    rng: np.random.Generator
    _table: PageTable

    def __init__(self, table: PageTable, *, seed: int = 0, next_use: Int64s | None = None) -> None:
        books, geometry = table.books, table.geometry
        vars(self).update(
            last_use=_locked(books.last_use),
            use_count=_locked(books.use_count),
            loaded_at=_locked(books.loaded_at),
            future=next_use,
            num_layers=geometry.num_layers,
            experts_per_layer=geometry.experts_per_layer,
            rng=np.random.default_rng(seed),
            _table=table,
        )

    def __setattr__(self, name: str, value: object) -> None:
        # The host reads the view, too: a policy that writes to it must not lead it astray.
        raise AttributeError(f"a policy cannot set view.{name}: views are read-only")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a policy cannot delete view.{name}: views are read-only")

    @property
    def event(self) -> int:
        """The running event, counted from 0."""
        return self._table.event

    @property
    def step(self) -> int:
        """The running forward pass."""
        return self._table.step

    @property
    def layer(self) -> int:
        """The MoE layer of the running event."""
        return self._table.layer

    @property
    def slots(self) -> int:
        return sum(self._table.slots)

    @property
    def resident(self) -> Bools:
        """Per page, whether it has a slot."""
        return read_only(self._table.resident)

    @property
    def next_use(self) -> Int64s:
        if self.future is None:
            raise AttributeError("next_use is known in the simulator only (needs_future = True)")
        return read_only(self.future)

    def page_of(self, layer: int, experts: npt.ArrayLike) -> Int64s:
        """The pages of ``experts`` of a layer."""
        return layer * self.experts_per_layer + np.asarray(experts, np.int64)


def read_only(array: npt.NDArray[T]) -> npt.NDArray[T]:
    """A view of ``array`` that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def _locked(array: Int64s) -> Int64s:
    """Like ``read_only``, but not even a change of its flags makes it writable."""
    return np.asarray(array.data.toreadonly())


class EvictionPolicy:
    """Decides which resident page is worth least. Only ``score`` is required.

    In place of ``score``, ``score_kernel``, ``make_kernel`` or ``select`` will do.

    Attributes:
        stable_score: Promise that a page's score changes only when it is accessed or loaded. The
            host then keeps the pages in order and asks for scores only after a change.
        score_kernel: A static function ``(last_use, use_count, loaded_at, event, page) -> float``
            in the subset of Python that numba compiles; used instead of ``score``. It divides as
            numpy does: by zero gives an infinity or NaN. More parameters may follow, by name:
            ``distance`` (layers until the page's layer has its turn, 1…num_layers), ``layer``
            (that of the page), ``num_layers``, and for oracles ``next_use``.
        needs_future: An oracle that reads ``view.next_use``: refused outside the simulator.
    """

    stable_score: ClassVar[bool] = False
    needs_future: ClassVar[bool] = False
    score_kernel: ClassVar[ScoreKernel | None] = None

    def score(self, view: PageView, pages: Int64s) -> npt.ArrayLike:
        """The worth of each of ``pages``: the lowest is evicted, ties go to the lowest page id.

        Args:
            view: The state of all pages.
            pages: Candidates in ascending order: resident, unpinned, not of this event.

        Returns:
            ``len(pages)`` numbers of any integer or float dtype; ±inf allowed, NaN is an error.
            Must be pure; called on the engine's thread only.
        """
        kernel = self.make_kernel(view)
        if kernel is None:
            raise NotImplementedError(f"{type(self).__name__} has no score, score_kernel or select")
        layer = pages // view.experts_per_layer
        named = {
            "distance": (layer - view.layer - 1) % view.num_layers + 1,
            "layer": layer,
            "num_layers": np.full_like(pages, view.num_layers),
            "next_use": np.zeros_like(pages) if view.future is None else view.future[pages],
        }
        columns = [
            *(view.last_use[pages], view.use_count[pages], view.loaded_at[pages]),
            *(np.full_like(pages, view.event), pages),
        ]
        columns += [named[name] for name in [*inspect.signature(kernel).parameters][len(columns) :]]
        return [kernel(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def make_kernel(self, view: PageView) -> ScoreKernel | None:
        """The score kernel of this object, for kernels that depend on its options or on the model.

        Called once, before the first event. It may be a function that closes over numbers, which
        then are constants to the compiler. By default it is the class's ``score_kernel``.
        """
        return type(self).score_kernel

    def on_access(self, view: PageView, access: Access) -> None:
        """An event has begun; ``last_use`` and ``use_count`` are up to date, nothing is loaded."""

    def on_load(self, view: PageView, pages: Int64s) -> None:
        """``pages`` were given slots."""

    def on_evict(self, view: PageView, pages: Int64s) -> None:
        """``pages`` were chosen as victims and lose their slots now."""

    def retain(self, view: PageView, access: Access) -> npt.ArrayLike:
        """Per page of the event, False to free its slot as soon as the layer has run."""
        return np.ones(len(access.pages), np.bool_)

    def select(self, view: PageView, pages: Int64s, n: int) -> npt.ArrayLike:
        """Choose ``n`` victims among ``pages`` instead of scoring (queues, quotas, ARC …)."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything: the books start cold again."""


class PrefetchPolicy(ABC):
    """Proposes pages to load before their layer asks for them.

    Attributes:
        lead: How many layers ahead the proposals reach; a policy that leads by 0 is never asked.
    """

    lead: int = 1

    @abstractmethod
    def propose(self, view: PageView, access: Access) -> npt.ArrayLike:
        """Pages of later layers, most urgent first. Resident ones among them are kept."""

    def reset(self) -> None:
        """Forget everything: the books start cold again."""


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
            a policy that suits the workload comes close to (``core.mrc``).
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
            anything was asked (``core.prefixes``).
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
