"""``lfru``: frequency decides until it is outdated. See also core/reference.py."""

import numpy as np
import pytest

from fluxmoe import plugins
from fluxmoe.core.paging.event import open_event
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import EvictionGuard
from fluxmoe.core.policy.paging import PageView
from fluxmoe.core.types import Geometry
from fluxmoe.errors import ConfigError
from fluxmoe.policies.eviction.lfru import LeastFrequentlyRecentlyUsed
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace.synth import Workload, write

LAYERS, EXPERTS = 4, 16


@pytest.fixture(scope="module")
def misses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    registry = plugins.load()
    known = {}

    def misses(policy, capacity, **workload):
        key = repr(sorted(workload.items()))
        if key not in known:
            path = folder / f"{len(known)}.parquet"
            write(Workload(LAYERS, EXPERTS, **workload), path)
            known[key] = Events.load(path)
        return simulate(known[key], policy, capacity, registry=registry).misses

    return misses


CHANGING = {"top_k": 2, "steps": 300, "batch": 1, "seed": 2, "drift": 0.3}


@pytest.mark.parametrize("capacity", ["25%", "50%", "75%"])
def test_where_favourites_change_it_beats_what_counts_only(misses, capacity):
    mine = misses("lfru", capacity, **CHANGING)
    assert mine < misses("lfu", capacity, **CHANGING)


@pytest.mark.parametrize("capacity", ["25%", "50%", "75%"])
@pytest.mark.parametrize("batch", [1, 8])
def test_where_favourites_stay_it_beats_lru(misses, capacity, batch):
    staying = {"top_k": 2, "steps": 150, "batch": batch, "drift": 0.01}
    assert misses("lfru", capacity, **staying) < 0.9 * misses("lru", capacity, **staying)


@pytest.mark.parametrize("capacity", ["25%", "50%", "75%"])
def test_on_cyclic_scans_it_is_the_optimum(misses, capacity):
    scan = {"top_k": EXPERTS, "steps": 20, "batch": 1}
    assert misses("lfru", capacity, **scan) == misses("belady", capacity, **scan)
    assert misses("lru", capacity, **scan) == LAYERS * EXPERTS * 20  # no hits at all


def scores(recency, history, pages):
    """Compute scores after ``history``, the experts used in each turn of a single layer."""
    table = PageTable(Geometry(1, EXPERTS), [EXPERTS])
    view = PageView(table)
    for step, experts in enumerate(history):
        open_event(table.books, step, 0, np.array(experts), np.zeros(0, np.int32))
    guard = EvictionGuard(LeastFrequentlyRecentlyUsed(recency), view, name="lfru", strict=True)
    return guard.scores(np.array(pages)).tolist()


def test_a_former_favourite_gives_way_in_time():
    # Expert 1 was used in the first 20 turns, expert 2 in the 8 before the last, and 0 in all.
    history = [[0, 1]] * 20 + [[0]] * 12 + [[0, 2]] * 8 + [[0]]
    always, former, present = scores(0.3, history, [0, 1, 2])
    assert always > present > former
    always, former, present = scores(0, history, [0, 1, 2])
    assert always > former > present  # in the estimate of next-use


def test_scores_are_as_documented():
    # Used in two of four turns, most recently one turn ago: wait = 1 + (5/2.5 - 1 + 0.3) turns.
    assert scores(0.3, [[1], [0], [1], [0]], [1]) == [pytest.approx(-(1 + 1.0 + 0.3))]


def test_recency_is_an_option_with_bounds():
    registry = plugins.load()
    registry.create("eviction", {"kind": "lfru", "recency": 0})
    for wrong in (-0.1, float("nan"), float("inf"), "much"):
        with pytest.raises(ConfigError, match="recency"):
            registry.create("eviction", {"kind": "lfru", "recency": wrong})
