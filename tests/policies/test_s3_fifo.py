"""``s3-fifo`` against the paper's algorithm in plain Python, driven by the event rule."""

import numpy as np
import pytest

from fluxmoe import plugins
from fluxmoe.errors import ConfigError
from fluxmoe.policies.eviction.s3_fifo import S3Fifo
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace.synth import Workload, write
from tests.core.rig import Rig

LAYERS, EXPERTS = 3, 16


class Model:
    """The paper's queues as lists, head first; eviction skips pages of the current event."""

    def __init__(self, slots, share):
        self.slots, self.target = slots, max(1, int(share * slots))
        self.most_ghosts = int((1 - share) * slots)
        self.small, self.main, self.ghosts, self.used = [], [], [], {}

    def event(self, pages):
        misses = [page for page in pages if page not in self.small + self.main]
        for page in set(pages) - set(misses):
            self.used[page] = min(self.used[page] + 1, 3)
        free = self.slots - len(self.small) - len(self.main)
        left = []
        for _ in range(len(misses) - free):
            self.evict(set(pages), left)
        for page in left:  # the event's victims become ghosts together
            if page in self.ghosts:
                self.ghosts.remove(page)
            self.ghosts.append(page)
        self.ghosts = self.ghosts[max(0, len(self.ghosts) - self.most_ghosts) :]
        for page in misses:
            (self.main if page in self.ghosts else self.small).append(page)
            if page in self.ghosts:
                self.ghosts.remove(page)
            self.used[page] = 0
        return len(misses)

    def evict(self, pinned, left):
        while True:
            small = [page for page in self.small if page not in pinned]
            main = [page for page in self.main if page not in pinned]
            if small and (len(self.small) >= self.target or not main):
                page = small[0]
                self.small.remove(page)
                if self.used[page] < 2:
                    left.append(page)
                    return
                self.main.append(page)
                self.used[page] = 0
            else:
                page = main[0]
                self.main.remove(page)
                if self.used[page] == 0:
                    return
                self.main.append(page)
                self.used[page] -= 1


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    path = tmp_path_factory.mktemp("s3") / "trace.parquet"
    write(Workload(LAYERS, EXPERTS, 2, 150, 2, seed=3, drift=0.1), path)
    return Events.load(path)


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("slots", [8, 12, 20, 29, 40])
def test_it_is_the_papers_algorithm(events, slots, share):
    model = Model(slots, share)
    expected = sum(
        model.event(sorted({layer * EXPERTS + int(expert) for expert in events.ids[at]}))
        for _, layer, _, at in events
    )
    policy = {"kind": "s3-fifo", "small": share}
    result = simulate(events, policy, slots, registry=plugins.load())
    assert result.misses == expected
    assert result.misses != simulate(events, "lru", slots).misses


@pytest.mark.parametrize("prefetch", ["next-layer", "markov"])
@pytest.mark.parametrize("banks", [1, 3])
def test_prefetched_pages_and_banks_are_no_fault(events, prefetch, banks):
    result = simulate(events, "s3-fifo", 36, prefetch, banks=banks)
    assert result.policy_faults == 0 and result.prefetch_hits > 0


def test_pages_that_left_without_being_victims_are_forgotten():
    """The policy is not notified when a bank shrinks or a page is discarded."""
    policy = S3Fifo()
    rig = Rig(LAYERS, EXPERTS, [40], eviction=policy)
    try:
        rng = np.random.default_rng(1)
        for turn in range(60):
            ids = rng.choice(EXPERTS, 4, replace=False).astype(np.int32)
            rig.pager.acquire(turn % LAYERS, ids, np.zeros(4, np.int32))
            if turn % 7 == 6:
                rig.pager.resize(0, int(rng.integers(EXPERTS, 41)))
        known = {*policy._small, *policy._main}
        assert set(np.flatnonzero(rig.pager.table.resident).tolist()) <= known
        rig.pager.check()
    finally:
        rig.close()


def test_the_small_queue_is_a_share():
    for wrong in (0, 1, -0.1, "much"):
        with pytest.raises(ConfigError, match="small"):
            plugins.load().create("eviction", {"kind": "s3-fifo", "small": wrong})
