"""Proposals of ``gate`` and ``markov``, and the simulator's predictions from traces."""

import numpy as np
import pytest

from fluxmoe import hookspecs, plugins
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import PrefetchGuard
from fluxmoe.core.policy.paging import EvictionPolicy, PageView, PrefetchPolicy
from fluxmoe.core.types import Access, Geometry, Phase
from fluxmoe.errors import ConfigError, PolicyFaultError
from fluxmoe.policies.prefetch.gate import Gate
from fluxmoe.policies.prefetch.markov import Markov
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import StepRows, TraceMeta, TraceWriter, shipped

LAYERS, EXPERTS = 3, 4


@pytest.fixture
def view():
    return PageView(PageTable(Geometry(LAYERS, EXPERTS), [LAYERS * EXPERTS]))


def access(layer, experts, tokens=None, predicted=None):
    pages = layer * EXPERTS + np.asarray(experts, np.int64)
    many = np.ones(len(pages), np.int64) if tokens is None else np.asarray(tokens)
    return Access(0, layer, pages, np.zeros(len(pages), bool), many, Phase.DECODE, predicted)


class Spy(PrefetchPolicy):
    """A policy that records its input."""

    def __init__(self):
        self.seen = []

    def propose(self, view, access):
        self.seen.append(access.predicted)
        return access.pages[:0]


def trace(path, *, predict):
    meta = TraceMeta("test", LAYERS, EXPERTS, 2, 1000, "test")
    rows = StepRows(np.arange(2, dtype=np.int32), np.ones(2, np.int8))
    with TraceWriter(path, meta, columns=("predicted",) if predict else ()) as writer:
        for step in range(2):
            for layer in range(LAYERS):
                told = [[3, 1], [3, 0]] if layer + 1 < LAYERS else [[], []]
                writer.append(
                    step, layer, np.asarray([[0, 1], [1, 2]]), Phase.DECODE, rows=rows,
                    predicted=np.asarray(told, np.int16) if predict else None,
                )  # fmt: skip
    return path


def watch(events):
    spies = []

    class Plugin:
        @hookspecs.hookimpl
        def fluxmoe_register_policies(self, register):
            def made() -> Spy:
                spies.append(Spy())
                return spies[-1]

            register("spy", made)

    known = plugins.load()
    known.add(Plugin(), "spy")
    simulate(events, "lru", LAYERS * EXPERTS, "spy", registry=known)
    return spies[-1].seen


def test_the_simulator_shows_what_the_trace_predicts(tmp_path):
    """Predictions are pages of the next layer, most tokens first; there are none after the last."""
    seen = watch(trace(tmp_path / "t.parquet", predict=True))
    assert [s.tolist() for s in seen] == [[7, 4, 5], [11, 8, 9], []] * 2


def test_without_the_column_nothing_is_predicted(tmp_path):
    assert watch(trace(tmp_path / "t.parquet", predict=False)) == [None] * 6


def test_eviction_policies_see_it_too(tmp_path):
    seen = []

    class Watching(EvictionPolicy):
        def score(self, view, pages):
            return pages

        def on_access(self, view, access):
            seen.append(access.predicted.tolist())

    class Plugin:
        @hookspecs.hookimpl
        def fluxmoe_register_policies(self, register):
            register("watching", Watching)

    known = plugins.load()
    known.add(Plugin(), "watching")
    simulate(trace(tmp_path / "t.parquet", predict=True), "watching", 12, registry=known)
    assert seen == [[7, 4, 5], [11, 8, 9], []] * 2


def test_gate_passes_on_what_is_predicted(view):
    assert Gate().propose(view, access(0, [1], predicted=np.asarray([6, 4]))).tolist() == [6, 4]
    assert Gate().propose(view, access(0, [1])).tolist() == []


def test_gate_without_predictions_is_none(tmp_path):
    path = trace(tmp_path / "t.parquet", predict=False)
    assert simulate(path, "lru", 6, "gate").loads_prefetch == 0


@pytest.mark.parametrize("name", shipped.NAMES)
def test_gate_knows_more_than_markov_and_both_more_than_nothing(name):
    """Check that both save misses, and that a larger share of ``gate``'s prefetches is used."""
    events = Events.load(shipped.path(name))
    none = simulate(events, "next-use", "50%")
    gate = simulate(events, "next-use", "50%", "gate")
    markov = simulate(events, "next-use", "50%", "markov")
    for run in (gate, markov):
        assert run.misses < none.misses
    assert gate.prefetch_hits / gate.loads_prefetch > 0.5
    assert gate.prefetch_hits / gate.loads_prefetch > markov.prefetch_hits / markov.loads_prefetch


@pytest.mark.parametrize("kind", ["gate", "markov"])
def test_waste_bounds_the_prefetched_pages_that_are_not_used(kind):
    events = Events.load(shipped.path("decode-1"))
    none = simulate(events, "next-use", "50%")
    free = simulate(events, "next-use", "50%", kind)
    bound = simulate(events, "next-use", "50%", {"kind": kind, "waste": 0.1})
    unused = free.loads_prefetch - free.prefetch_hits
    assert unused > 0.3 * free.loads_demand
    unused = bound.loads_prefetch - bound.prefetch_hits
    # One event's proposals may exceed the bound.
    assert 0 < unused <= 0.1 * bound.loads_demand + events.meta.top_k
    assert free.misses < bound.misses < none.misses
    nothing = simulate(events, "next-use", "50%", {"kind": kind, "waste": 0})
    assert nothing.loads_prefetch - nothing.prefetch_hits <= events.meta.top_k


@pytest.mark.parametrize("waste", [-1, "much", True, float("nan")])
def test_a_policy_with_a_wrong_waste(tmp_path, waste):
    policy = Spy()
    policy.waste = waste
    with pytest.raises(PolicyFaultError, match="waste"):
        PrefetchGuard(policy, PageView(PageTable(Geometry(1, 4), [4])), name="spy", strict=True)


def test_markov_learns_what_follows_what(view):
    policy = Markov(top=2)
    for _ in range(3):
        assert policy.propose(view, access(2, [3])).size in (0, 1)  # the first event of layer 0
        policy.propose(view, access(0, [1]))
        policy.propose(view, access(1, [0, 2]))
    policy.propose(view, access(0, [1, 2]))
    policy.propose(view, access(1, [3]))  # followed expert 1 in one of its four events
    assert policy.propose(view, access(0, [1])).tolist() == [4, 6]
    # Expert 3 was never used in this layer, so there is no estimate.
    assert policy.propose(view, access(0, [3])).tolist() == []


def test_markov_weighs_by_tokens(view):
    policy = Markov(top=1)
    for before, after in ((0, 0), (1, 1)):
        policy.propose(view, access(0, [before]))
        policy.propose(view, access(1, [after]))
    assert policy.propose(view, access(0, [0, 1], tokens=[1, 5])).tolist() == [5]
    assert policy.propose(view, access(0, [0, 1], tokens=[5, 1])).tolist() == [4]


def test_markov_leads_by_more_layers_and_never_proposes_the_running_one(view):
    policy = Markov(lead=2)
    for _ in range(2):
        for layer in range(LAYERS):
            policy.propose(view, access(layer, [layer]))
    assert policy.propose(view, access(0, [0])).tolist() == [2 * EXPERTS + 2]
    whole = Markov(lead=LAYERS)
    for layer in (0, 1, 2, 0):
        assert whole.propose(view, access(layer, [0])).tolist() == []


def test_markov_learns_nothing_across_a_gap(view):
    policy = Markov()
    policy.propose(view, access(0, [0]))
    policy.propose(view, access(2, [1]))  # layer 1 had no event
    assert policy.propose(view, access(0, [0])).tolist() == []


def test_markov_forgets_and_its_memory_does_not_grow(view):
    policy = Markov(top=1)
    for after in [0] * 1500 + [1] * 1600:
        policy.propose(view, access(0, [0]))
        policy.propose(view, access(1, [after]))
    assert policy.propose(view, access(0, [0])).tolist() == [5]
    assert policy._followed.max() <= 1024 and policy._followed.shape == (LAYERS, EXPERTS, EXPERTS)
    policy.reset()
    assert policy.propose(view, access(0, [0])).tolist() == []


def test_options_are_checked():
    for wrong in ({"top": 0}, {"lead": 0}, {"lead": 1.5}):
        with pytest.raises(ConfigError):
            plugins.load().create("prefetch", {"kind": "markov", **wrong})
