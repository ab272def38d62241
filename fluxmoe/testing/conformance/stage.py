"""Stages, and their audited replays with the production page table and event rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fluxmoe.core.memory.sizing import spread
from fluxmoe.core.paging.replay import replay
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.paging import EvictionPolicy, PrefetchPolicy
from fluxmoe.policies.eviction.next_use import NextUse
from fluxmoe.policies.prefetch.next_layer import NextLayer
from fluxmoe.policies.prefetch.none import NoPrefetch
from fluxmoe.testing.conformance.audit import (
    AuditedEviction,
    AuditedPrefetch,
    WatchedView,
)
from fluxmoe.testing.golden import GOLDEN, GoldenTrace

Watcher = Callable[["Replay"], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """A golden trace at one capacity.

    Attributes:
        trace, capacity: The trace, and the total number of slots.
        banks: Number of banks.
        fetches: True if ``next-layer`` prefetches while an eviction policy is tested.
        resizes: True if the banks shrink to their minimum and grow again during the replay.
    """

    trace: GoldenTrace
    capacity: int
    banks: int = 1
    fetches: bool = False
    resizes: bool = False

    def __str__(self) -> str:
        more = [
            f"{self.capacity} slots",
            *([f"{self.banks} banks"] if self.banks > 1 else []),
            *(["prefetch next-layer"] if self.fetches else []),
            *(["resized during the replay"] if self.resizes else []),
        ]
        return f"golden trace {self.trace.name} with {', '.join(more)}"


def stages() -> Iterator[Stage]:
    """Yield all stages: few to all slots, one or two banks, some with prefetch or resizing."""
    for trace in GOLDEN.values():
        for capacity in trace.capacities:
            yield Stage(trace, capacity)
    mixed, sparse, predicted = GOLDEN["mixed"], GOLDEN["sparse"], GOLDEN["predicted"]
    yield Stage(mixed, 24, banks=2)
    yield Stage(mixed, 30, fetches=True)
    yield Stage(sparse, 40, fetches=True)
    yield Stage(predicted, 30, banks=2, fetches=True)
    yield Stage(sparse, 32, resizes=True)


#: The stage for conformance rules that are slow to check, with events of many sizes and half of the
#: pages resident.
USUAL = Stage(GOLDEN["mixed"], 24)
SOME = (USUAL, Stage(USUAL.trace, 30, fetches=True))


class Replay:
    """A stage in progress, which starts cold.

    Args:
        stage: The stage to replay.
        eviction: Eviction policy; by default ``next-use``.
        prefetch: Prefetch policy; by default none, or ``next-layer`` if the stage fetches.
        seed: Random seed of ``view.rng``.

    Attributes:
        missed: Number of misses of each event so far, int32.
    """

    def __init__(
        self,
        stage: Stage,
        eviction: EvictionPolicy | None = None,
        prefetch: PrefetchPolicy | None = None,
        seed: int = 0,
    ) -> None:
        events = stage.trace.events
        self.stage, self._events = stage, events
        eviction = eviction or NextUse()
        oracle = eviction.needs_future
        geometry = events.meta.geometry
        slots, bank_of = spread(geometry, stage.capacity, stage.banks)
        self.table = PageTable(geometry, slots, bank_of=bank_of, minimum=events.largest)
        future = events.future.first.copy() if oracle else None
        self.view = WatchedView(self.table, seed=seed, next_use=future)
        self.eviction = AuditedEviction(eviction, self.view, str(stage))
        fetcher = prefetch or (NextLayer() if stage.fetches else NoPrefetch())
        self.prefetch = AuditedPrefetch(fetcher, self.view, str(stage))
        self.rule = EventRule(self.table, self.eviction, self.prefetch)
        self._list = events.foreseen if oracle else events.block
        self.missed = np.zeros(len(events), np.int32)
        self._at = 0

    def run(self, share: float = 1.0, watch: Watcher | None = None) -> npt.NDArray[np.int32]:
        """Replay up to ``share`` of the trace and return the misses of each event.

        Args:
            share: Fraction of the whole trace, counted from the start.
            watch: Called after each event.

        Raises:
            Broken: The policy failed.
        """
        if self.stage.resizes and share == 1.0:
            self._replay(0.4, watch)
            least = self.table.minimum
            for bank in range(self.stage.banks):
                self.rule.shrink(bank, least)
            self._replay(0.6, watch)
            for bank, slots in enumerate(spread(self.table.geometry, self.stage.capacity, 1)[0]):
                self.table.resize(bank, slots)
        self._replay(share, watch)
        return self.missed

    def _replay(self, share: float, watch: Watcher | None) -> None:
        end = round(share * len(self._events))
        replay(
            self.rule,
            self._list,
            self._at,
            end,
            self.missed,
            None if watch is None else lambda rule, at: watch(self),
        )
        self._at = end

    def restart(self) -> None:
        """Restart cold, as an engine does after its warm-up."""
        self.rule.reset()
        seed = type(self.view.rng.bit_generator)(0).state
        self.view.rng.bit_generator.state = seed
        if self.eviction.future is not None:
            self.eviction.future[:] = self._events.future.first
        self.missed = np.zeros_like(self.missed)
        self._at = 0
