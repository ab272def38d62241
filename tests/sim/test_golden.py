"""Exact misses of every built-in policy on the shipped traces, and those of libCacheSim."""

import json

import numpy as np
import pytest

from fluxmoe.core.types import EventList, Phase
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import TraceMeta, shipped

from . import golden

ROWS = json.loads(golden.FILE.read_text())


@pytest.fixture(scope="module")
def traces():
    return {name: Events.load(shipped.path(name)) for name in shipped.NAMES}


def test_every_policy_has_a_row():
    expected = {
        (trace, kind, policy)
        for trace in shipped.NAMES
        for kind in ("eviction", "prefetch")
        for policy in golden.policies(kind)
    }
    assert {(trace, kind, policy) for trace, kind, policy, _ in ROWS} == expected
    assert len(ROWS) == len(expected)


#: Policies that run in Python take seconds on the long traces, so one capacity is enough.
LONG, IN_PYTHON = ("decode-1", "decode-8"), ("immediate", "s3-fifo")


@pytest.mark.parametrize(("trace", "kind", "policy", "counts"), ROWS)
def test_misses_are_as_recorded(traces, trace, kind, policy, counts):
    measure, capacities = golden.table, golden.CAPACITIES
    if kind == "prefetch":
        measure, capacities = golden.prefetch_table, golden.PREFETCH_CAPACITIES
    if trace in LONG and (kind == "prefetch" or policy in IN_PYTHON):
        capacities, counts = capacities[-1:], counts[-1:]
    assert measure(traces[trace], policy, capacities) == counts


def test_belady_is_the_least_and_next_use_close_to_the_best_simple_one():
    for trace in shipped.NAMES:
        rows = {
            policy: counts for name, of, policy, counts in ROWS if (name, of) == (trace, "eviction")
        }
        for at in range(len(golden.CAPACITIES)):
            assert min(counts[at] for counts in rows.values()) == rows["belady"][at]
            best = min(rows[policy][at] for policy in ("lru", "lfu", "lfru"))
            assert rows["next-use"][at] <= 1.01 * best, (trace, golden.CAPACITIES[at])


def single(events):
    """Make a trace with one expert per event from a shipped trace's pages."""
    experts = events.meta.experts_per_layer
    pages = [
        page
        for _, layer, _, at in events
        for page in np.unique(layer * experts + events.ids[at].astype(np.int64)).tolist()
    ]
    count = len(pages)
    block = EventList(
        np.arange(count, dtype=np.int32),
        np.zeros(count, np.int16),
        np.full(count, Phase.DECODE, np.int8),
        np.arange(count + 1),
        np.asarray(pages, np.int32),
    )
    total = events.meta.geometry.num_pages
    return Events(TraceMeta("single", 1, total, 1, 1, "test"), block), pages


@pytest.mark.parametrize("trace", ["decode-1", "prefill"])
def test_lru_and_belady_miss_as_often_as_in_libcachesim(traces, trace):
    libcachesim = pytest.importorskip(
        "libcachesim", reason="libcachesim (GPL) is not installed; pip install libcachesim"
    )
    events, pages = single(traces[trace])
    following, later = {}, [0] * len(pages)
    for at in range(len(pages) - 1, -1, -1):
        later[at] = following.get(pages[at], np.iinfo(np.int64).max)
        following[pages[at]] = at
    for capacity in golden.CAPACITIES:
        for name, theirs in (("lru", libcachesim.LRU), ("belady", libcachesim.Belady)):
            cache, misses = theirs(capacity), 0
            for at, page in enumerate(pages):
                request = libcachesim.Request(
                    obj_size=1, obj_id=page, clock_time=at, next_access_vtime=later[at]
                )
                misses += not cache.get(request)
            assert simulate(events, name, capacity).misses == misses, capacity
