import numpy as np
import pytest
from fluxmoe_sieve import Sieve

from fluxmoe import plugins
from fluxmoe.sim.simulator import simulate
from fluxmoe.testing import GOLDEN, check_eviction_policy


def test_it_keeps_to_the_contract():
    check_eviction_policy(Sieve)


@pytest.fixture
def registry():
    return plugins.load(["fluxmoe_sieve"])


class Oracle:
    """The paper's algorithm, one page at a time: a linked list, marks and a hand."""

    def __init__(self, capacity):
        self.capacity, self.order, self.marked, self.hand = capacity, [], set(), None
        self.misses = 0

    def use(self, page):
        if page in self.order:
            self.marked.add(page)
            return
        self.misses += 1
        if len(self.order) == self.capacity:
            self.evict()
        self.order.append(page)

    def evict(self):
        at = self.order.index(self.hand) if self.hand in self.order else 0
        while self.order[at] in self.marked:
            self.marked.remove(self.order[at])
            at = (at + 1) % len(self.order)
        del self.order[at]
        self.hand = self.order[at] if at < len(self.order) else None


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 15])
def test_where_events_have_one_page_it_is_the_algorithm_of_the_paper(registry, capacity):
    events = GOLDEN["flat"].events  # one layer, one expert per event
    oracle = Oracle(capacity)
    for *_, where in events:
        oracle.use(int(events.ids[where][0]))
    assert simulate(events, "sieve", capacity, registry=registry).misses == oracle.misses


def test_it_beats_lru_where_use_is_skewed_and_nothing_does_in_a_scan(registry):
    for name, better in (("sparse", True), ("mixed", True), ("scan", False)):
        trace = GOLDEN[name]
        misses = simulate(trace.events, "sieve", "50%", registry=registry).misses
        assert (misses < trace.misses["lru"][1]) is better, name
        assert misses >= trace.misses["belady"][1]


def test_pages_that_were_there_before_it_can_be_evicted():
    policy = Sieve()
    victims = policy.select(None, np.array([3, 5, 9]), 2)
    assert victims.tolist() == [3, 5]
