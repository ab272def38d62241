"""Golden traces: small traces with known miss counts, generated in memory from a seed.

Golden traces are the same on every machine, so tests can contain results from another machine.
``misses`` has the results of built-in policies, for comparison with other policies or
implementations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fluxmoe.core.types import EventList, Phase
from fluxmoe.sim.events import Events
from fluxmoe.trace import TraceMeta
from fluxmoe.trace.synth import Workload


@dataclass(frozen=True)
class GoldenTrace:
    """A trace and known facts about it.

    Attributes:
        name: Key in ``GOLDEN``.
        workload: Generator of the trace.
        capacities: Numbers of slots: the largest event's pages, half of all pages, and all pages.
        misses: Policy → misses at each of ``capacities``, without prefetch.
        predicted: True if events predict the next layer's experts (always correctly).
    """

    name: str
    workload: Workload
    capacities: tuple[int, ...]
    misses: Mapping[str, tuple[int, ...]]
    predicted: bool = False

    @cached_property
    def events(self) -> Events:
        """The trace in memory, for the simulator."""
        return events_of(self.workload, predicted=self.predicted)


def events_of(workload: Workload, *, predicted: bool = False) -> Events:
    """Generate a synthetic workload as a trace in memory.

    Args:
        workload: The workload.
        predicted: Add a correct prediction of the next layer's experts to each event.
    """
    ids, phases = [], []
    for step, layers in enumerate(workload.routing()):
        phase = Phase.PREFILL if workload.is_scan(step) else Phase.DECODE
        ids += [layer.astype(np.int32).ravel() for layer in layers]
        phases += [phase] * len(layers)
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    count = workload.steps * workload.layers
    layers_of = np.tile(np.arange(workload.layers, dtype=np.int16), workload.steps)
    block = EventList(
        step=np.repeat(np.arange(workload.steps, dtype=np.int32), workload.layers),
        layer=layers_of,
        phase=np.asarray(phases, np.int8),
        offsets=offsets,
        ids=np.concatenate(ids),
        starts=np.arange(offsets[-1]) % workload.top_k == 0,
    )
    if predicted:
        last = workload.layers - 1
        ahead = [ids[i + 1] if layers_of[i] < last else ids[i][:0] for i in range(count)]
        block = block._replace(
            guess_offsets=np.cumsum([0, *map(len, ahead)], dtype=np.int64),
            guesses=np.concatenate(ahead),
        )
    meta = TraceMeta(
        model="synthetic",
        num_layers=workload.layers,
        experts_per_layer=workload.experts,
        top_k=workload.top_k,
        page_bytes=None,
        source="fluxmoe.testing",
    )
    return Events(meta, block)


#: Name → trace. ``sparse`` is decode at batch size 2, ``mixed`` has a prefill in every tenth step,
#: ``scan`` is only prefill, ``predicted`` has predictions of the next layer's experts, ``flat`` has
#: one layer, and ``thin`` has one expert per layer.
GOLDEN: dict[str, GoldenTrace] = {
    trace.name: trace
    for trace in (
        GoldenTrace(
            "sparse",
            Workload(layers=4, experts=16, top_k=2, steps=60, batch=2, seed=1),
            (4, 32, 64),
            {"lru": (836, 320, 64), "next-use": (821, 279, 64), "belady": (819, 164, 64)},
        ),
        GoldenTrace(
            "mixed",
            Workload(layers=6, experts=8, top_k=2, steps=60, batch=2, seed=2, scan_every=10),
            (8, 24, 48),
            {"lru": (1345, 817, 48), "next-use": (1151, 570, 48), "belady": (1074, 418, 48)},
        ),
        GoldenTrace(
            "scan",
            Workload(layers=3, experts=8, top_k=2, steps=20, batch=4, seed=3, scan_every=1),
            (8, 12, 24),
            {"lru": (480, 480, 24), "next-use": (480, 364, 24), "belady": (480, 364, 24)},
        ),
        GoldenTrace(
            "predicted",
            Workload(layers=4, experts=12, top_k=2, steps=40, batch=2, seed=4),
            (4, 24, 48),
            {"lru": (554, 242, 48), "next-use": (548, 209, 48), "belady": (544, 131, 48)},
            predicted=True,
        ),
        GoldenTrace(
            "flat",
            Workload(layers=1, experts=16, top_k=1, steps=60, batch=1, seed=5),
            (1, 8, 16),
            {"lru": (53, 24, 15), "next-use": (53, 24, 15), "belady": (53, 17, 15)},
        ),
        GoldenTrace(
            "thin",
            Workload(layers=4, experts=1, top_k=1, steps=20, batch=1, seed=6),
            (1, 2, 4),
            {"lru": (80, 80, 4), "next-use": (80, 54, 4), "belady": (80, 54, 4)},
        ),
    )
}
