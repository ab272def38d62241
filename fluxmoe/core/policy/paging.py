"""The contracts of eviction and prefetch policies, and the read-only view they decide from.

A policy needs no copy of the host's records: recency, frequency and residency are in the view, as
numpy arrays over all pages, and a policy returns arrays. The arrays are copies: numpy's read-only
flag is no protection (``torch.from_numpy`` ignores it), and the kernel of a layer reads what the
books say. A complete policy has three lines::

    class MostRecentlyUsed(fluxmoe.EvictionPolicy):
        def score(self, view, pages):
            return -view.last_use[pages]

The host validates every answer and contains faults (see ``guards``); policies need no defence.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fluxmoe.core.types import Access, Bools, Geometry, Int64s

T = TypeVar("T", bound=np.generic)

ScoreKernel = Callable[..., float]


class Uses(Protocol):
    """Usage records of pages, as ``PageView`` describes them: int64 ``[pages]`` each."""

    @property
    def last_use(self) -> Int64s: ...
    @property
    def use_count(self) -> Int64s: ...
    @property
    def loaded_at(self) -> Int64s: ...


class Residency(Protocol):
    """The part of a page table that a view and its guards read (``paging.table`` has the whole).

    ``books`` are the host's arrays; ``uses`` are copies of them, up to date, for policies.
    """

    @property
    def books(self) -> Uses: ...
    @property
    def uses(self) -> Uses: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def slots(self) -> Sequence[int]: ...
    @property
    def event(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def resident(self) -> Bools: ...


class PageView:
    """Input of eviction and prefetch policies: arrays over all pages, read-only.

    Attributes:
        last_use: int64 ``[pages]``, event in which the page was last routed to, −1 = never.
        use_count: int64 ``[pages]``, number of events that routed to it; survives eviction.
        loaded_at: int64 ``[pages]``, event in which it last got a slot, −1 = never.
        next_use: int64 ``[pages]``, next event that routes to it; simulator only, for oracles
            (``needs_future``). ``NO_NEXT_USE`` if there is none.
        num_layers, experts_per_layer, slots: Geometry, and number of usable slots over all banks.
        rng: Seeded random generator, the only randomness a policy may use.
    """

    NO_NEXT_USE: ClassVar[int] = np.iinfo(np.int64).max

    num_layers: int
    experts_per_layer: int
    rng: np.random.Generator
    _table: Residency
    _future: Int64s | None  # ``next_use``, kept up to date by the simulator

    def __init__(self, table: Residency, *, seed: int = 0, next_use: Int64s | None = None) -> None:
        geometry = table.geometry
        vars(self).update(
            num_layers=geometry.num_layers,
            experts_per_layer=geometry.experts_per_layer,
            rng=np.random.default_rng(seed),
            _table=table,
            _future=next_use,
        )

    def __setattr__(self, name: str, value: object) -> None:
        # The host reads the view as well: a policy must not be able to corrupt it.
        raise AttributeError(f"a policy cannot set view.{name}: views are read-only")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a policy cannot delete view.{name}: views are read-only")

    @property
    def last_use(self) -> Int64s:
        return self._table.uses.last_use

    @property
    def use_count(self) -> Int64s:
        return self._table.uses.use_count

    @property
    def loaded_at(self) -> Int64s:
        return self._table.uses.loaded_at

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
        """Bool ``[pages]``, True for pages that have a slot."""
        return own(self._table.resident)

    @property
    def next_use(self) -> Int64s:
        if self._future is None:
            raise AttributeError("next_use is known in the simulator only (needs_future = True)")
        return own(self._future)

    def page_of(self, layer: int, experts: npt.ArrayLike) -> Int64s:
        """The pages of ``experts`` of a layer."""
        return layer * self.experts_per_layer + np.asarray(experts, np.int64)


def own(array: npt.NDArray[T]) -> npt.NDArray[T]:
    """A copy for a policy, read-only: a mistake is reported, and if that is evaded, harmless."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


class EvictionPolicy:
    """Decides which resident page is worth least. Only ``score`` is required.

    ``score_kernel``, ``make_kernel`` or ``select`` can replace ``score``.

    Attributes:
        stable_score: Promise that a page's score changes only when it is accessed or loaded. The
            host then keeps the pages in order and asks for scores only after a change.
        score_kernel: A static function ``(last_use, use_count, loaded_at, event, page) -> float``
            in the subset of Python that numba compiles; used instead of ``score``. Division follows
            numpy: by zero it gives an infinity or NaN. More parameters may follow, by name:
            ``distance`` (layers until the page's layer runs, 1…num_layers), ``layer`` (that of the
            page), ``num_layers``, and for oracles ``next_use``.
        needs_future: True for an oracle that reads ``view.next_use``; refused outside the
            simulator.
    """

    stable_score: ClassVar[bool] = False
    needs_future: ClassVar[bool] = False
    score_kernel: ClassVar[ScoreKernel | None] = None

    def score(self, view: PageView, pages: Int64s) -> npt.ArrayLike:
        """The value of each of ``pages``: the lowest is evicted, ties go to the lowest page id.

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
            "next_use": np.zeros_like(pages) if view._future is None else view._future[pages],
        }
        columns = [
            *(view.last_use[pages], view.use_count[pages], view.loaded_at[pages]),
            *(np.full_like(pages, view.event), pages),
        ]
        columns += [named[name] for name in [*inspect.signature(kernel).parameters][len(columns) :]]
        return [kernel(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def make_kernel(self, view: PageView) -> ScoreKernel | None:
        """The score kernel of this object, for kernels that depend on its options or on the model.

        Called once, before the first event. The function may close over numbers, which the
        compiler treats as constants. The default is the class's ``score_kernel``.
        """
        return type(self).score_kernel

    def on_access(self, view: PageView, access: Access) -> None:
        """Called when an event begins; ``last_use`` and ``use_count`` already include it."""

    def on_load(self, view: PageView, pages: Int64s) -> None:
        """Called when ``pages`` were assigned slots."""

    def on_evict(self, view: PageView, pages: Int64s) -> None:
        """Called when ``pages`` were chosen as victims and are about to lose their slots."""

    def retain(self, view: PageView, access: Access) -> npt.ArrayLike:
        """For each page of the event, False to free its slot as soon as the layer has run."""
        return np.ones(len(access.pages), np.bool_)

    def select(self, view: PageView, pages: Int64s, n: int) -> npt.ArrayLike:
        """Choose ``n`` victims among ``pages`` instead of scoring (queues, quotas, ARC …)."""
        raise NotImplementedError

    def reset(self) -> None:
        """Clear all state: the books were reset."""


class PrefetchPolicy(ABC):
    """Proposes pages to load before their layer needs them.

    Attributes:
        lead: Number of layers that proposals reach ahead; a policy with 0 is never asked.
    """

    lead: int = 1

    @abstractmethod
    def propose(self, view: PageView, access: Access) -> npt.ArrayLike:
        """Pages of later layers, most urgent first. Resident ones among them are kept."""

    def reset(self) -> None:
        """Clear all state: the books were reset."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The paging policies of one worker, each with the name under which it was chosen."""

    eviction: EvictionPolicy
    prefetch: PrefetchPolicy
    eviction_name: str
    prefetch_name: str
