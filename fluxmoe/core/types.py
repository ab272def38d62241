"""Basic frozen types: geometry, page layout, events, accesses, budgets and counters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.integer]
Int64s: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Bytes: TypeAlias = npt.NDArray[np.uint8]

#: Kinds of age, in events: the time that an evicted page was resident, the time since an evicted
#: page's last use, and the interval between two uses of a page.
LIFETIME, IDLE, REUSE = range(3)
#: Number of age buckets. The upper bound of bucket n is 2^n; the last bucket is unbounded.
AGES = 24


class Phase(IntEnum):
    """Kind of work in a step. A step with both kinds counts as prefill."""

    PREFILL = 0
    DECODE = 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """Numbers of layers and of experts per layer. Only MoE layers count; the first has number 0."""

    num_layers: int
    experts_per_layer: int

    @property
    def num_pages(self) -> int:
        return self.num_layers * self.experts_per_layer

    def page(self, layer: int, expert: int) -> int:
        return layer * self.experts_per_layer + expert


class EventList(NamedTuple):
    """A list of N consecutive events. Event ``i`` routes to ``ids[offsets[i]:offsets[i + 1]]``.

    ``ids`` has one entry per (token, expert) pair, including repeats. ``starts`` is True for the
    first entry of each token, and may be empty if no event runs in waves. ``later`` has, for each
    entry, the next event that uses the same page, and is empty if no policy needs it. Event
    ``i`` predicts ``guesses[guess_offsets[i]:guess_offsets[i + 1]]`` for the next layer, including
    repeats; without predictions, ``guess_offsets`` is empty.
    """

    step: npt.NDArray[np.int32]  # [N]
    layer: npt.NDArray[np.int16]  # [N]
    phase: npt.NDArray[np.int8]  # [N], ``Phase``
    offsets: Int64s  # [N + 1]
    ids: npt.NDArray[np.int32]
    later: Int64s = np.zeros(0, np.int64)
    guess_offsets: Int64s = np.zeros(0, np.int64)  # [N + 1]
    guesses: npt.NDArray[np.int32] = np.zeros(0, np.int32)
    starts: Bools = np.zeros(0, np.bool_)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an expert (``w13``, ``w2`` …) in the layout that the kernel reads.

    ``elements`` is the number of weights; kernels with narrow indices limit this number.
    """

    name: str
    nbytes: int
    elements: int


@dataclass(frozen=True, slots=True)
class PageClass:
    """The layout that all expert pages of a model have in common: their parts, in order."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Budget:
    """Minimum, target and maximum number of frames of a tenant."""

    min: int
    target: int
    max: int


@dataclass(frozen=True, slots=True)
class Access:
    """One event in the form that policies get: the distinct experts to which one MoE layer routes.

    Attributes:
        step: Number of the engine's forward pass, from 0.
        layer: Number of the MoE layer, from 0.
        pages: Distinct pages in ascending order, int64.
        hit: True for each page that was resident when the event began.
        tokens: Number of (token, expert) pairs routed to each page, int64.
        phase: Phase of the step.
        predicted: Pages that the next layer's router would choose for this layer's hidden states,
            in descending order of tokens. None in traces without the column ``predicted``, and in
            engines unless the prefetch policy sets ``predictions``.
    """

    step: int
    layer: int
    pages: Int64s
    hit: Bools
    tokens: Int64s
    phase: Phase = Phase.DECODE
    predicted: Int64s | None = None


@dataclass(frozen=True, slots=True)
class Loads:
    """Pages that were just assigned slots: ``pages[i]`` goes into ``slots[i]`` of a bank."""

    bank: int
    pages: Int64s
    slots: Int64s

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, some: slice) -> Loads:
        return Loads(self.bank, self.pages[some], self.slots[some])

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of a page and its slot."""
        return list(zip(self.pages.tolist(), self.slots.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Wave:
    """Tokens of an event that run together, and the pages that must be loaded first.

    Attributes:
        tokens: Indices of the tokens within the event, int64 ``[tokens]``.
        loads: Pages that must be loaded before the tokens run.
    """

    tokens: Int64s
    loads: Loads


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the last ``reset()``, as the event rule defines them.

    ``accesses = hits + misses`` counts each distinct expert once per event. ``prefetch_hits`` are
    the hits on prefetched pages that had not been used since they were loaded. ``evictions`` counts
    the victims that made room for demanded or prefetched pages, ``released`` counts pages that the
    policy did not retain, and ``resized`` counts pages that lost their slots because the tenant
    shrank or the weights changed. ``cold`` counts misses on pages that had never been loaded.
    ``reloads`` counts loads of a page beyond the first within one event that runs in waves.
    """

    events: int
    accesses: int
    hits: int
    misses: int
    evictions: int
    released: int
    resized: int
    prefetch_hits: int
    loads_demand: int
    loads_prefetch: int
    cold: int
    reloads: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.accesses if self.accesses else 0.0
