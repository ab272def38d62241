"""Simulator = engine: on a pager's trace, the simulator has the same counters as the pager."""

import numpy as np
import pytest

from fluxmoe.core.memory.sizing import spread
from fluxmoe.core.types import Geometry
from fluxmoe.policies.eviction.immediate import Immediate
from fluxmoe.policies.eviction.lfu import LeastFrequentlyUsed
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.policies.eviction.next_use import NextUse
from fluxmoe.policies.prefetch.next_layer import NextLayer
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import TraceMeta, TraceWriter
from tests.core.rig import PAGE_CLASS, Rig

LAYERS, EXPERTS, TOP_K = 3, 8, 2
CAPACITY = 6


@pytest.mark.parametrize("capacity", [CAPACITY, TOP_K])
@pytest.mark.parametrize("banks", [1, 2])
@pytest.mark.parametrize("prefetch", [None, NextLayer])
@pytest.mark.parametrize("policy", [LeastRecentlyUsed, LeastFrequentlyUsed, Immediate, NextUse])
def test_replay_equals_the_pager(tmp_path, registry, policy, prefetch, banks, capacity):
    rng = np.random.default_rng(3)
    slots_of, bank_of = spread(Geometry(LAYERS, EXPERTS), capacity * 2 * banks, banks)
    rig = Rig(LAYERS, EXPERTS, slots_of, bank_of=bank_of, eviction=policy(),
              prefetch=prefetch and prefetch(), threads=1, minimum=TOP_K)  # fmt: skip
    meta = TraceMeta("rig", LAYERS, EXPERTS, TOP_K, PAGE_CLASS.nbytes, "test")
    slots = np.zeros((12, TOP_K), np.int32)
    try:
        for _ in range(5):  # warm-up, which is neither recorded nor counted
            rig.compute(0, np.arange(EXPERTS).reshape(-1, TOP_K))
        rig.pager.reset()
        with TraceWriter(tmp_path / "t.parquet", meta) as writer:
            rig.pager.watcher = writer.append
            for _ in range(60):
                for layer in range(LAYERS):
                    weights = 1 / np.arange(1, EXPERTS + 1)
                    ids = np.stack([
                        rng.choice(EXPERTS, TOP_K, replace=False, p=weights / weights.sum())
                        for _ in range(12)
                    ]).astype(np.int32)  # fmt: skip
                    ids[rng.integers(1, 13) :] = -1  # padding rows
                    rig.pager.run(layer, ids, slots, lambda tokens: None)
        engine = rig.pager.counters()
        moved = rig.transfer.bytes_demand, rig.transfer.bytes_prefetch
    finally:
        rig.close()

    names = {LeastRecentlyUsed: "lru", LeastFrequentlyUsed: "lfu", Immediate: "immediate",
             NextUse: "next-use"}  # fmt: skip
    result = simulate(
        tmp_path / "t.parquet", names[policy], capacity * 2 * banks,
        "next-layer" if prefetch else "none",
        banks=banks, registry=registry,
    )  # fmt: skip
    for counter in ("events", "accesses", "hits", "misses", "prefetch_hits", "evictions",
                    "released", "loads_demand", "loads_prefetch", "reloads"):  # fmt: skip
        assert getattr(result, counter) == getattr(engine, counter), counter
    assert (result.reloads > 0) == (capacity == TOP_K)
    assert (result.bytes_demand, result.bytes_prefetch) == moved
