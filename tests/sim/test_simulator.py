"""The simulator compared with an independent reference of the event rule."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fluxmoe
from fluxmoe import plugins
from fluxmoe.core.paging.books import MISSES
from fluxmoe.core.paging.replay import replay as replay_events
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.paging import EvictionPolicy
from fluxmoe.core.policy.watchdog import Limits
from fluxmoe.core.types import EventList, Phase
from fluxmoe.errors import CapacityError, ConfigError, PolicyFaultError, UnknownPolicyError
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import Simulation, simulate
from fluxmoe.trace import TraceMeta, TraceReader
from fluxmoe.trace.synth import Workload, write
from tests.core.reference import replay
from tests.core.rig import rule_for

POLICIES = ["lru", "lfu", "lfru", "belady", "immediate", "mru"]
PREFETCH = {
    "none": "none",
    "next-layer": "next-layer",
    "next-layer:depth=2": {"kind": "next-layer", "depth": 2},
}


def in_memory(rows, layers, experts, top_k, page_bytes=1000):
    """Make events from a list of (step, layer, ids)."""
    meta = TraceMeta("test", layers, experts, top_k, page_bytes, "test")
    ids = [np.asarray(ids, np.int32) for _, _, ids in rows]
    block = EventList(
        np.asarray([step for step, _, _ in rows], np.int32),
        np.asarray([layer for _, layer, _ in rows], np.int16),
        np.full(len(rows), Phase.DECODE, np.int8),
        np.cumsum([0, *map(len, ids)]),
        np.concatenate(ids),
    )
    return Events(meta, block)


def check(events, rows, policy, capacity, prefetch, banks, registry):
    meta = events.meta
    expected = replay(
        [(layer, ids) for _, layer, ids in rows], meta.num_layers, meta.experts_per_layer,
        policy, capacity, prefetch, banks,
    )  # fmt: skip
    result = simulate(
        events, policy, capacity, PREFETCH[prefetch], banks=banks, registry=registry
    ).to_json()
    assert {name: result[name] for name in expected} == expected
    assert result["capacity_pages"] == capacity
    assert result["bytes_demand"] == expected["loads_demand"] * meta.page_bytes
    assert result["bytes_prefetch"] == expected["loads_prefetch"] * meta.page_bytes
    assert result["hit_rate"] == expected["hits"] / expected["accesses"]
    return result


@st.composite
def traces(draw):
    layers = draw(st.integers(1, 4))
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    token = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k, unique=True)
    rows = []
    for step in range(draw(st.integers(1, 12))):
        for layer in range(layers):
            if draw(st.integers(0, 9)):  # occasionally an event is missing
                tokens = draw(st.lists(token, min_size=1, max_size=3))
                rows.append((step, layer, [expert for ids in tokens for expert in ids]))
    if not rows:
        rows.append((0, 0, list(range(top_k))))
    banks = draw(st.integers(1, layers))
    largest = max(len(set(ids)) for _, _, ids in rows)
    # Banks get slots in proportion to their layers, so the smallest bank determines the minimum.
    least = largest if banks == 1 else largest * layers
    capacity = draw(st.integers(least, layers * experts + 2))
    return rows, layers, experts, top_k, banks, capacity


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces())
def test_equals_the_reference_on_any_trace(registry, case):
    rows, layers, experts, top_k, banks, capacity = case
    events = in_memory(rows, layers, experts, top_k)
    for policy in POLICIES:
        for prefetch in PREFETCH:
            check(events, rows, policy, capacity, prefetch, banks, registry)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    path = tmp_path_factory.mktemp("synth") / "trace.parquet"
    write(Workload(4, 16, 3, 60, 2, seed=5), path)
    events = Events.load(path)
    rows = [(step, layer, events.ids[at].tolist()) for step, layer, _, at in events]
    return events, rows


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefetch", PREFETCH)
def test_equals_the_reference_at_many_capacities(registry, synthetic, policy, prefetch):
    events, rows = synthetic
    for capacity in (events.largest, 9, 16, 23, 40, 63, 64):
        check(events, rows, policy, capacity, prefetch, 1, registry)
    for banks in (2, 3, 4):
        check(events, rows, policy, 40, prefetch, banks, registry)


def test_the_reference_tells_policies_apart(registry, synthetic):
    """Check that policies differ; otherwise, the comparisons above would prove little."""
    events, rows = synthetic
    misses = {
        policy: check(events, rows, policy, 24, "none", 1, registry)["misses"]
        for policy in POLICIES
    }
    assert len(set(misses.values())) == len(POLICIES)
    assert min(misses, key=misses.get) == "belady"


def test_an_event_is_never_counted_token_by_token(registry):
    events = in_memory([(0, 0, [1, 2, 2, 1]), (1, 0, [2, 3])], 1, 4, 2)
    result = simulate(events, "lru", 2, registry=registry)
    assert (result.accesses, result.hits, result.misses, result.evictions) == (4, 1, 3, 1)


def test_belady_knows_the_first_use_of_a_page_that_was_only_prefetched(registry):
    # Layer 0 prefetches all of layer 1 = {4, 5, 6, 7}; the pages differ only in their first use.
    rows = [(0, 0, [0]), (1, 0, [1]), (2, 1, [2]), (3, 0, [2]), (4, 1, [0])]
    events = in_memory(rows, 2, 4, 1)
    for capacity in range(1, 9):
        check(events, rows, "belady", capacity, "next-layer", 1, registry)


@pytest.mark.parametrize(
    ("written", "pages"),
    [(96, 96), ("96", 96), ("25%", 16), ("29%", 18), ("12.5%", 8), ("100%", 64), ("20kB", 20),
     ("16KiB", 16), ("0.0101MB", 10)],
)  # fmt: skip
def test_capacities(registry, written, pages):
    rows = [(0, layer, [0]) for layer in range(4)]
    events = in_memory(rows, 4, 16, 1, page_bytes=1000)
    assert simulate(events, "lru", written, registry=registry).capacity_pages == pages


@pytest.mark.parametrize("written", ["", "many", "-3", "-5%", "1/0%", "12 parsecs"])
def test_what_is_no_capacity(registry, written):
    events = in_memory([(0, 0, [0])], 1, 2, 1)
    with pytest.raises(ConfigError, match="not a valid capacity"):
        simulate(events, "lru", written, registry=registry)


def test_bytes_need_a_page_size(registry):
    events = in_memory([(0, 0, [0])], 1, 2, 1, page_bytes=None)
    with pytest.raises(ConfigError, match="the trace has no page size"):
        simulate(events, "lru", "2GiB", registry=registry)
    assert simulate(events, "lru", 2, registry=registry).bytes_demand is None


def test_a_capacity_below_the_largest_event(registry):
    events = in_memory([(0, 0, [0]), (1, 0, [0, 1, 2, 2]), (2, 0, [3])], 1, 8, 1)
    assert simulate(events, "lru", 3, registry=registry).misses == 4
    with pytest.raises(CapacityError, match=r"2 slots .* 3 experts"):
        simulate(events, "lru", 2, registry=registry)
    with pytest.raises(CapacityError, match="0 slots"):
        simulate(events, "lru", "1%", registry=registry)


def test_as_many_banks_as_layers_at_most(registry):
    events = in_memory([(0, 0, [0])], 2, 2, 1)
    with pytest.raises(ConfigError, match="3 banks for 2 layers"):
        simulate(events, "lru", 4, banks=3, registry=registry)


def test_unknown_policy_lists_the_known(registry):
    events = in_memory([(0, 0, [0])], 1, 2, 1)
    with pytest.raises(UnknownPolicyError, match=r"lfu.*lru.*mru"):
        simulate(events, "lrru", 2, registry=registry)


#: Faults of a policy, and their messages.
FAULTS = {
    "raises": ("return 1 / 0", "ZeroDivisionError"),
    "not a number": ("return np.full(len(pages), np.nan)", "not finite|NaN|nan"),
    "one too few": ("return np.zeros(len(pages) - 1)", "shape|length|scores"),
    "words": ("return np.array(['low'] * len(pages))", "dtype|numbers"),
    "nothing": ("return None", "None"),
    "writes": ("view.last_use[:] = 0; return -view.last_use[pages]", "read-only"),
    "sleeps": ("time.sleep(3); return -view.last_use[pages]", "more than 2 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_contained_and_counted_or_raised(fault, registry, tmp_path):
    body, words = FAULTS[fault]
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "import time\n"
        "import numpy as np\n"
        "import fluxmoe\n"
        "class Broken(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages):\n"
        f"        {body}\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register):\n"
        "    register('broken', Broken)\n"
    )
    known = plugins.load([str(plugin)])
    steps = 3 if fault == "sleeps" else 9  # each call is interrupted after two seconds
    events = in_memory([(step, 0, [step % 3]) for step in range(steps)], 1, 4, 1)
    contained = simulate(events, "broken", 2, registry=known, strict=False)
    assert contained.policy_faults == steps - 2
    assert contained.evictions == simulate(events, "lru", 2, registry=known).evictions
    if fault == "sleeps":  # a slow call is not a fault where no engine waits
        events = in_memory([(step, 0, [step % 3]) for step in range(3)], 1, 4, 1)
        assert simulate(events, "broken", 2, registry=known).policy_faults == 0
        return
    with pytest.raises(PolicyFaultError, match=rf"'broken'.*({words})"):
        simulate(events, "broken", 2, registry=known)


def test_c5_no_policy_is_slow_in_the_simulator(tmp_path, caplog):
    plugin = tmp_path / "slow.py"
    plugin.write_text(
        "import time\n"
        "import fluxmoe\n"
        "class Slow(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages):\n"
        "        end = time.thread_time() + 0.006\n"
        "        while time.thread_time() < end:\n"
        "            pass\n"
        "        return -view.last_use[pages]\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register):\n"
        "    register('slow', Slow)\n"
    )
    events = in_memory([(step, 0, [step % 3]) for step in range(90)], 1, 4, 1)
    assert simulate(events, "slow", 2, registry=plugins.load([str(plugin)])).evictions > 2 * 16
    assert "slow" not in caplog.text


def test_the_phase_of_an_event_reaches_the_policy(tmp_path):
    from fluxmoe.core.policy.paging import EvictionPolicy

    seen = []

    class Watching(EvictionPolicy):
        def score(self, view, pages):
            return pages

        def on_access(self, view, access):
            seen.append(access.phase)

    class Plugin:
        @fluxmoe.hookimpl
        def fluxmoe_register_policies(self, register):
            register("watching", Watching)

    known = plugins.load()
    known.add(Plugin(), "watching")
    rows = [(0, 0, [0]), (1, 0, [1])]
    events = in_memory(rows, 1, 2, 1)
    events.block.phase[:] = [Phase.PREFILL, Phase.DECODE]
    Simulation(events, "watching", 2, registry=known).run()
    assert seen == [Phase.PREFILL, Phase.DECODE]


class CannotCount(EvictionPolicy):
    """A kernel that fails in one of three events, in one of two ways."""

    @staticmethod
    def score_kernel(last_use, use_count, loaded_at, event, page):
        if event % 6 == 2:
            raise ValueError("never learnt it")
        return np.nan if event % 6 == 5 else float(-last_use)


class CannotCountStable(CannotCount):
    stable_score = True


@pytest.mark.parametrize("policy", [CannotCount, CannotCountStable])
@pytest.mark.parametrize("strikes", [3, 10**6])
def test_a_kernel_that_fails_now_and_then_is_contained_event_by_event(policy, strikes, synthetic):
    """The compiled replay stops at the event, the guard falls back, and the replay continues."""
    events, _ = synthetic
    missed = np.zeros(len(events), np.int32)
    fast, slow = (_rule(policy(), strikes, events) for _ in range(2))
    replay_events(fast, events.block, 0, len(events), missed)
    one_by_one = []
    for step, layer, _, where in events:
        slow.run(step, layer, events.ids[where])
        one_by_one.append(int(slow.table.books.now[MISSES]))
    assert missed.tolist() == one_by_one
    assert fast.table.counters() == slow.table.counters()
    assert np.array_equal(fast.table.books.slot_of >= 0, slow.table.books.slot_of >= 0)
    assert fast.eviction.faults == slow.eviction.faults > 2
    assert fast.eviction.faults == strikes or strikes > 3
    fast.table.check()


def _rule(policy, strikes, events):
    table = PageTable(events.meta.geometry, [23])
    return rule_for(table, policy, limits=Limits(strikes=strikes))


def test_c10_results_and_traces_as_text(tmp_path, registry):
    trace = tmp_path / "t.parquet"
    write(Workload(layers=2, experts=8, top_k=2, steps=20, batch=2), trace)
    events = Events.load(trace)
    model = f"{events.meta.model}: 2 layers of 8 experts, top 2"
    assert repr(events) == f"Events({model}, events=40)"
    reader = TraceReader(trace)
    assert repr(reader) == f"TraceReader({str(trace)!r}, {model}, rows={reader.num_rows})"
    result = simulate(events, {"kind": "lfru"}, 8, registry=registry, hardware="laptop-nvme")
    assert repr(result) == (
        f"Result(lfru, prefetch=none, slots=8, hit_rate={result.hit_rate:.1%}, "
        f"misses={result.misses})"
    )
    html = result._repr_html_()
    for name, value in (("hit rate", f"{result.hit_rate:.1%}"), ("capacity pages", "8")):
        assert f"<th style='text-align:left'>{name}</th><td>{value}</td>" in html
    assert "laptop-nvme" in html and "None" not in html
    risky = dataclasses.replace(result, policy="<b>")
    assert "&lt;b&gt;" in risky._repr_html_() and "<b>" not in risky._repr_html_()
