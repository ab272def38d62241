"""The words of FluxMoE as small frozen values: geometry, page layout, access, budget, counters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.integer]
Int64s: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Bytes: TypeAlias = npt.NDArray[np.uint8]

#: Kinds of age, all in events: how long a page was resident when it left; how long it had not been
#: used by then; and from one use of a page to the next.
LIFETIME, IDLE, REUSE = range(3)
#: Ages are counted by power of two: bucket n has those up to 2^n, the last one all others.
AGES = 24


class Phase(IntEnum):
    """What a step mostly does. A batch that mixes both counts as prefill."""

    PREFILL = 0
    DECODE = 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """How many expert pages a model has. Layers are MoE layers only, counted from 0."""

    num_layers: int
    experts_per_layer: int

    @property
    def num_pages(self) -> int:
        return self.num_layers * self.experts_per_layer

    def page(self, layer: int, expert: int) -> int:
        return layer * self.experts_per_layer + expert


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an expert (``w13``, ``w2`` …) as the kernel reads it.

    ``elements`` is the number of weights, which kernels with narrow indices are limited by.
    """

    name: str
    nbytes: int
    elements: int


@dataclass(frozen=True, slots=True)
class PageClass:
    """The common layout of all expert pages of a model: its parts, in order."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Budget:
    """The frames a tenant must have, should have and may have."""

    min: int
    target: int
    max: int


@dataclass(frozen=True, slots=True)
class Access:
    """One event as policies see it: the distinct experts that one MoE layer routes to.

    Attributes:
        step: Forward pass of the engine, from 0.
        layer: MoE layer, from 0.
        pages: Distinct pages in ascending order, int64.
        hit: Per page, whether it was resident when the event began.
        tokens: Per page, how many (token, expert) pairs were routed to it, int64.
        phase: What the step mostly does.
        predicted: Pages of the next layer that its router chooses for this layer's hidden states,
            those that most tokens want first. None where nobody can tell: always in the engines,
            and in traces without the column.
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
    """Pages that were just given a slot: page ``pages[i]`` belongs into ``slots[i]`` of a bank."""

    bank: int
    pages: Int64s
    slots: Int64s

    def __len__(self) -> int:
        return len(self.pages)


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the last ``reset()``, as the event rule defines them.

    ``accesses = hits + misses`` counts distinct experts, once per event. ``prefetch_hits`` is the
    part of ``hits`` that a prefetch brought in and nobody had used before. ``evictions`` are
    victims for demand or prefetch, ``released`` pages were given up because the policy did not
    retain them, ``resized`` ones because the tenant shrank.
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

    @property
    def hit_rate(self) -> float:
        return self.hits / self.accesses if self.accesses else 0.0
