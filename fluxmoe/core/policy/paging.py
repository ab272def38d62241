"""The contracts of eviction and prefetch policies, and their input, a read-only view.

A policy needs no records of its own: recency, frequency and residency are in the view, as numpy
arrays over all pages, and the policy's answers are arrays. The view's arrays are copies, since the
host relies on the originals and numpy's read-only flag does not protect them
(``torch.from_numpy`` ignores the flag). A complete policy takes three lines::

    class MostRecentlyUsed(fluxmoe.EvictionPolicy):
        def score(self, view, pages):
            return -view.last_use[pages]

The host validates every answer and contains faults (see ``guards``), so policies need not check
anything.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fluxmoe.core.types import Access, Bools, Geometry, Int64s

T = TypeVar("T", bound=np.generic)

ScoreKernel = Callable[..., float]


class Uses(Protocol):
    """Usage records of pages, int64 ``[pages]`` each, with the meanings given in ``PageView``."""

    @property
    def last_use(self) -> Int64s: ...
    @property
    def use_count(self) -> Int64s: ...
    @property
    def loaded_at(self) -> Int64s: ...


class Residency(Protocol):
    """The part of a page table that views and guards read (see ``paging.table``).

    ``books`` are the host's arrays; ``uses`` are up-to-date copies of these arrays for policies.
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
    """Input to eviction and prefetch policies: arrays over all pages, read-only.

    Attributes:
        last_use: int64 ``[pages]``, event in which the page was last routed to; −1 = never.
        use_count: int64 ``[pages]``, number of events that routed to the page; kept across
            evictions.
        loaded_at: int64 ``[pages]``, event in which the page was last loaded; −1 = never.
        next_use: int64 ``[pages]``, next event that routes to the page, ``NO_NEXT_USE`` if there is
            none; available only in the simulator, for oracles (``needs_future``).
        num_layers, experts_per_layer, slots: Geometry, and number of usable slots in all banks.
        rng: Seeded random generator, the only source of randomness a policy may use.
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
        # The host reads the view too: a policy must not be able to corrupt it.
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
        """The current event, counted from 0."""
        return self._table.event

    @property
    def step(self) -> int:
        """The current forward pass."""
        return self._table.step

    @property
    def layer(self) -> int:
        """The MoE layer of the current event."""
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
            raise AttributeError("next_use is known only in the simulator (needs_future = True)")
        return own(self._future)

    def page_of(self, layer: int, experts: npt.ArrayLike) -> Int64s:
        """Return the page ids of ``experts`` in a layer."""
        return layer * self.experts_per_layer + np.asarray(experts, np.int64)


def own(array: npt.NDArray[T]) -> npt.NDArray[T]:
    """Return a read-only copy for a policy: writing raises an error, and is harmless if forced."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


class EvictionPolicy:
    """Ranks resident pages for eviction. Only ``score`` is required.

    ``score_kernel``, ``make_kernel`` or ``select`` can replace ``score``.

    Attributes:
        stable_score: Promise that a page's score changes only when the page is accessed or loaded.
            The host then keeps the pages in order and requests scores only after a change.
        score_kernel: A static function ``(last_use, use_count, loaded_at, event, page) -> float``
            in the subset of Python that numba compiles; it replaces ``score``. Division follows
            numpy: dividing by zero gives an infinity or NaN. Further parameters may follow, with
            these names: ``distance`` (number of layers until the page's layer runs,
            1…num_layers), ``layer`` (the page's), ``num_layers``, and, for oracles, ``next_use``.
        needs_future: True for an oracle that reads ``view.next_use``; such a policy is rejected
            outside the simulator.
    """

    stable_score: ClassVar[bool] = False
    needs_future: ClassVar[bool] = False
    score_kernel: ClassVar[ScoreKernel | None] = None

    def score(self, view: PageView, pages: Int64s) -> npt.ArrayLike:
        """Return the value of each page in ``pages``; the page with the lowest value is evicted.

        Ties go to the lowest page id. The method must be pure, and is called only on the engine's
        thread.

        Args:
            view: The state of all pages.
            pages: Candidates in ascending order: resident pages that this event does not use;
                protected pages only if there are not enough others.

        Returns:
            ``len(pages)`` numbers of any integer or float dtype; ±inf is allowed, but NaN is a
            fault.
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
        """Make the score kernel of this object, for a kernel that depends on options or the model.

        The host calls this method once, before the first event. The kernel may close over numbers,
        which the compiler treats as constants. The default is the class's ``score_kernel``.
        """
        return type(self).score_kernel

    def on_access(self, view: PageView, access: Access) -> None:
        """Handle the start of an event, which ``last_use`` and ``use_count`` already reflect."""

    def on_load(self, view: PageView, pages: Int64s) -> None:
        """Handle the assignment of slots to ``pages``."""

    def on_evict(self, view: PageView, pages: Int64s) -> None:
        """Handle the eviction of ``pages``, just before they lose their slots."""

    def retain(self, view: PageView, access: Access) -> npt.ArrayLike:
        """Return, for each page of the event, False to free its slot when the layer has run."""
        return np.ones(len(access.pages), np.bool_)

    def select(self, view: PageView, pages: Int64s, n: int) -> npt.ArrayLike:
        """Choose ``n`` victims among ``pages``, instead of scoring (queues, quotas, ARC …)."""
        raise NotImplementedError

    def reset(self) -> None:
        """Clear all state: the books were reset."""


class PrefetchPolicy(ABC):
    """Proposes pages to load before their layer needs them.

    Attributes:
        lead: Number of layers that proposals look ahead; a policy whose lead is 0 is never called.
        predictions: True to get ``Access.predicted``. Engines then compute the next layer's router
            on each layer's hidden states.
        waste: Prefetched pages that were not used, as a share of the pages loaded on demand, above
            which proposals are ignored. Both are counted since the last reset.
    """

    lead: int = 1
    predictions: bool = False
    waste: float = inf

    @abstractmethod
    def propose(self, view: PageView, access: Access) -> npt.ArrayLike:
        """Return pages of later layers, most urgent first. Resident pages among them are kept."""

    def reset(self) -> None:
        """Clear all state: the books were reset."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The paging policies of one worker, each with its configured name."""

    eviction: EvictionPolicy
    prefetch: PrefetchPolicy
    eviction_name: str
    prefetch_name: str
