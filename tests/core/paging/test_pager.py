"""The pager: correct bytes in slots and consistent bookkeeping, even if the store fails."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import fluxmoe
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.paging.victims import victims
from fluxmoe.core.policy import faults
from fluxmoe.errors import (
    CapacityError,
    InvariantError,
    OutOfFramesError,
    PolicyFaultError,
    StoreError,
    SubstrateError,
)
from fluxmoe.policies.eviction.immediate import Immediate
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.policies.prefetch.next_layer import NextLayer
from fluxmoe.testing.faults import FaultySubstrate
from tests.core.reference import Reference, kernel, stable_kernel
from tests.core.rig import (
    FRAME,
    PAGE_CLASS,
    HighestPages,
    Kernel,
    Rig,
    StableKernel,
    frames_of_memory,
    host_only,
)

GROUNDS = ("host", "cuda, kernels", "cuda, copies")

reference_keys = {Kernel: kernel, StableKernel: stable_kernel}


@pytest.fixture
def rig(request):
    rigs = []

    def make(*args, **options) -> Rig:
        rigs.append(Rig(*args, **options))
        return rigs[-1]

    yield make
    for each in rigs:
        each.close()


threads = pytest.mark.parametrize("threads", [0, 1, 3])


def test_slots_answer_ids_in_their_order(rig):
    r = rig()
    assert r.acquire(1, [3, 0, -1, 3, 1]) == [2, 0, 0, 2, 1]
    assert r.acquire(0, [2]) == [3]
    assert r.acquire(1, [0, 1, 3]) == [0, 1, 2]
    c = r.pager.counters()
    assert (c.hits, c.misses) == (3, 4)
    assert r.pager.transfer.bytes_demand == 4 * PAGE_CLASS.nbytes


def test_slots_of_a_second_bank_are_its_own(rig):
    r = rig(3, 4, (5, 4), bank_of=[0, 1, 1])
    assert r.acquire(0, [1, 2]) == [0, 1]
    assert r.acquire(1, [0]) == [0]
    assert r.acquire(2, [3, 2]) == [2, 1]
    r.check()


def test_a_step_begins_where_the_layers_start_again_and_watchers_see_every_event(rig):
    r, seen = rig(), []
    r.pager.watcher = lambda step, layer, ids, phase: seen.append((step, layer, ids.tolist()))
    for layer, ids in [(0, [1, -1]), (2, [0]), (1, [2]), (1, [3, 3]), (2, []), (0, [0])]:
        r.acquire(layer, ids)
    assert [event[:2] for event in seen] == [(0, 0), (0, 2), (1, 1), (2, 1), (2, 2), (3, 0)]
    assert [event[2] for event in seen] == [[1, -1], [0], [2], [3, 3], [], [0]]
    r.pager.reset()
    r.acquire(2, [0])
    assert seen[-1] == (0, 2, [0])


# --- waves ---------------------------------------------------------------------------------------


def test_a_layer_that_fits_runs_at_once_and_one_that_does_not_runs_in_waves(rig):
    r = rig(2, 6, (3,), minimum=2)
    assert r.compute(0, [[0, 1], [1, 2]]) == [[0, 1]]
    assert r.compute(0, [[0, 1], [4, 5], [1, 2], [-1, -1]]) == [[3, 0, 2], [1]]
    r.check()
    c = r.pager.counters()
    assert (c.accesses, c.misses, c.reloads) == (8, 5, 0)
    r.compute(0, [[0, 1], [2, 3], [4, 5], [0, 5]])
    c = r.pager.counters()
    assert c.reloads > 0
    assert r.transfer.bytes_demand == (c.loads_demand + c.reloads) * PAGE_CLASS.nbytes


@threads
def test_a_failed_read_in_a_wave_leaves_no_page_whose_bytes_are_missing(rig, threads):
    r = rig(2, 6, (3,), minimum=2, threads=threads)
    r.compute(0, [[0, 1]])
    for broken in range(6):
        r.store.broken = {broken}
        before = r.resident
        try:
            r.compute(0, [[0, 1], [2, 3], [4, 5], [0, 5]])
        except StoreError:
            r.check()
            assert r.resident <= before
        r.store.broken = set()
        r.compute(1, [[0, 1], [2, 3], [4, 5], [1, 4]])
        r.compute(0, [[5, 1]])


def test_a_kernel_that_fails_in_a_wave_leaves_no_page_that_was_not_copied(rig):
    r = rig(2, 6, (3,), minimum=2)
    ids = np.array([[0, 1], [2, 3], [4, 5]], np.int32)

    def fails(tokens):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        r.pager.run(0, ids, np.zeros_like(ids), fails)
    r.check()
    assert r.resident == set()
    r.compute(0, ids)


def test_waves_prefetch_into_other_banks_only(rig):
    r = rig(2, 6, (3, 6), bank_of=[0, 1], minimum=2, prefetch=NextLayer())
    r.compute(0, [[0, 1], [2, 3], [4, 5]])
    assert r.resident >= set(range(6, 12))
    assert r.pager.counters().loads_prefetch == 6
    r.compute(1, [[0, 1], [2, 3], [4, 5]])
    assert r.pager.counters().prefetch_hits == 6


# --- stores that fail ----------------------------------------------------------------------------


@threads
def test_after_a_failed_read_on_demand_the_pages_are_absent_and_the_next_acquire_works(
    rig, threads
):
    r = rig(threads=threads)
    r.acquire(0, [0, 1])
    r.store.broken = {6}
    with pytest.raises(StoreError, match="page 6"):
        r.acquire(1, [0, 1, 2, 3])
    r.check()
    assert r.resident == {0, 1}  # neither the broken page nor the other pages of its event
    c = r.pager.counters()
    assert (c.hits, c.misses, c.evictions) == (0, 6, 0)
    r.acquire(0, [0, 1])
    r.acquire(1, [0, 1, 3])
    r.store.broken = set()
    r.acquire(1, [0, 1, 2, 3])
    r.check()


@threads
def test_a_failed_read_under_immediate_eviction_releases_no_page_twice(rig, threads):
    r = rig(eviction=Immediate(), threads=threads)
    r.store.broken = {6}
    with pytest.raises(StoreError):
        r.acquire(1, [0, 2])
    r.check()
    r.acquire(1, [0])
    assert r.pager.counters().released == 0
    r.acquire(2, [0])
    assert r.pager.counters().released == 1
    r.check()


@threads
def test_a_failed_prefetch_surfaces_when_its_layer_runs_and_the_next_acquire_works(rig, threads):
    r = rig(slots=(9,), prefetch=NextLayer(), threads=threads)
    r.store.broken = {6}
    r.acquire(0, [0])
    assert r.resident == {0, 4, 5, 6, 7}
    with pytest.raises(StoreError, match="page 6"):
        r.acquire(1, [1, 2])
    r.check()
    assert 6 not in r.resident
    with pytest.raises(StoreError, match="page 6"):
        r.acquire(1, [1, 2])  # read again on demand, but still broken
    r.store.broken = set()
    r.acquire(1, [1, 2])
    r.acquire(2, [0, 1, 2, 3])
    r.check()


@threads
def test_a_failed_prefetch_beside_misses_leaves_those_absent(rig, threads):
    r = rig(slots=(6,), prefetch=NextLayer(), threads=threads)
    r.acquire(0, [0, 1, 2])  # three slots are left: 4, 5 and 6 are fetched
    r.store.broken = {6}
    r.pager.reset()
    r.acquire(0, [0, 1, 2])
    with pytest.raises(StoreError, match="page 6"):
        r.acquire(1, [2, 3])
    r.check()
    assert r.resident == {0, 1, 2, 4, 5}
    r.acquire(1, [0, 1, 3])
    r.check()


@threads
def test_a_failed_prefetch_of_a_page_that_nobody_uses_does_not_matter(rig, threads):
    r = rig(slots=(8,), prefetch=NextLayer(), threads=threads)
    r.store.broken = {6}
    for _ in range(3):
        for layer in range(3):
            r.acquire(layer, [0, 1])
    r.check()


@threads
def test_random_failures_never_serve_wrong_bytes(rig, threads):
    r = rig(4, 6, (11,), prefetch=NextLayer(2), threads=threads)
    rng = np.random.default_rng(5)
    served = failed = 0
    for event in range(400):
        if event % 3 == 0:  # for three events, so that a second try may fail too
            r.store.broken = set(rng.choice(24, 4).tolist()) if rng.random() < 0.6 else set()
        try:
            r.acquire(event % 4, rng.integers(-1, 6, 5).tolist())  # compares the bytes
            served += 1
        except StoreError:
            failed += 1
        r.check()
    assert served > 100
    assert failed > 20


# --- strict policies that fail -------------------------------------------------------------------


class _Failing(LeastRecentlyUsed):
    """A policy that fails in one call to one method."""

    def __init__(self, method, nth):
        self.method, self.left = method, nth

    def fail(self, method):
        self.left -= method == self.method
        if not self.left and method == self.method:
            raise ValueError("planned")

    def on_access(self, view, access):
        self.fail("on_access")

    def on_load(self, view, pages):
        self.fail("on_load")

    def on_evict(self, view, pages):
        self.fail("on_evict")

    def retain(self, view, access):
        self.fail("retain")
        return access.tokens > 0

    def score(self, view, pages):
        self.fail("score")
        return super().score(view, pages)


class _NextLayerWatched(NextLayer):
    """A prefetch policy that fails when the test's eviction policy is set to fail there."""

    def __init__(self, eviction):
        super().__init__()
        self.eviction = eviction

    def propose(self, view, access):
        self.eviction.fail("propose")
        return super().propose(view, access)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("nth", range(1, 5))
@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize(
    "method", ["on_access", "on_load", "on_evict", "retain", "score", "propose"]
)
def test_after_a_strict_fault_no_page_without_its_bytes_is_resident(
    rig, method, nth, stable, threads
):
    policy = type("P", (_Failing,), {"stable_score": stable})(method, nth)
    r = rig(slots=(7,), eviction=policy, prefetch=_NextLayerWatched(policy), threads=threads)
    failed = 0
    for event in range(24):
        try:
            r.acquire(event % 3, [0, 1, 3 - event % 2])  # compares the bytes
        except PolicyFaultError as error:
            assert method in str(error)
            failed += 1
        r.check()
    assert failed == 1


# --- resize --------------------------------------------------------------------------------------


class Leaving(LeastRecentlyUsed):
    def __init__(self):
        self.gone = []

    def on_evict(self, view, pages):
        self.gone += pages.tolist()


def test_a_policy_hears_of_the_victims_of_a_bank_that_shrinks(rig):
    policy = Leaving()
    r = rig(slots=(6,), eviction=policy)
    r.acquire(0, [0, 1, 2, 3])
    r.acquire(1, [0, 1])
    assert policy.gone == []
    r.pager.resize(0, 4)
    assert sorted(policy.gone) == [0, 1]


def test_a_bank_that_shrinks_keeps_what_the_policy_values(rig):
    r = rig(slots=(6,), reserved=(12,))
    r.acquire(0, [0, 1, 2, 3])
    r.acquire(1, [0, 1])  # into the two slots that are removed next
    r.pager.resize(0, 4)
    r.check()
    assert r.tenant.frames == frames_for(PAGE_CLASS, 4, FRAME)
    assert r.resident == {2, 3, 4, 5}  # 0 and 1 were used least recently
    assert r.pager.counters().resized == 2
    loads = r.pager.counters().loads_demand
    assert r.acquire(1, [0, 1]) == [0, 1]  # the pages were moved, not loaded again
    assert r.pager.counters().loads_demand == loads
    r.pager.resize(0, 12)
    r.check()
    r.acquire(1, [0, 1, 2, 3])
    assert r.acquire(0, [2, 3]) == [2, 3]


class _Oldest(fluxmoe.EvictionPolicy):
    """LRU as a kernel that is not stable, so that each event scores all pages again."""

    @staticmethod
    def score_kernel(last_use, use_count, loaded_at, event, page):
        return last_use


@pytest.mark.parametrize("policy", [LeastRecentlyUsed, _Oldest])
def test_pages_that_moved_keep_their_scores(rig, policy):
    r = rig(slots=(8,), eviction=policy())
    for layer, experts in [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (0, [0, 1])]:
        r.acquire(layer, experts)
    r.pager.resize(0, 6)  # 2 and 3 are evicted; 6 and 7 move into their slots
    assert r.resident == {0, 1, 4, 5, 6, 7}
    r.acquire(2, [0])
    assert r.resident == {0, 1, 5, 6, 7, 8}


@pytest.mark.parametrize("policy", [Kernel, StableKernel])
def test_a_kernel_that_answers_too_late_loses_no_page(rig, policy, monkeypatch):
    r = rig(3, 8, (11,), eviction=policy(), strict=False)
    model = Reference(3, 8, (11,), [0] * 3, reference_keys[policy])
    run, late, rng = faults.PolicyCaller.run, [], np.random.default_rng(3)

    def sometimes_late(counter, method, function, *args):
        answer = run(counter, method, function, *args)
        late.append(function is victims and len(late) % 3 == 0)
        return None if late[-1] else answer

    monkeypatch.setattr(faults.PolicyCaller, "run", sometimes_late)
    for event in range(150):
        ids = rng.integers(0, 8, 4).tolist()
        r.acquire(event % 3, ids)
        model.event(event % 3, ids)
        assert r.resident == model.resident
    assert sum(late) > 20


def test_nobody_is_asked_for_more_victims_than_there_are_candidates(rig):
    r = rig(slots=(5,), eviction=HighestPages(), prefetch=NextLayer())  # strict
    for layer in (0, 1, 2, 0):
        r.acquire(layer, [0, 1, 2, 3])
    r.check()


@threads
def test_a_page_moves_although_its_copy_is_still_queued(rig, threads):
    r = rig(layers=2, slots=(8,), prefetch=NextLayer(), threads=threads)
    r.acquire(0, [0])  # prefetches layer 1 into slots 1 … 4
    r.acquire(1, [0, 1, 2, 3])  # prefetches 1 … 3 of layer 0 into slots 5 … 7
    r.pager.resize(0, 7)
    r.check()
    assert r.pager.counters().resized == 1
    for layer in (1, 0):
        r.acquire(layer, [0, 1, 2, 3])


def test_a_page_that_cannot_be_completed_is_given_up_when_it_should_move(rig):
    r = rig(layers=2, slots=(8,), reserved=(12,), prefetch=NextLayer())
    r.pager.resize(0, 12)
    r.store.broken = {7}
    r.acquire(0, [0, 1, 2, 3])
    r.acquire(0, [0])
    r.pager.resize(0, 7)  # the policy evicts page 1; 7 would move into the slot of 1
    r.check()
    assert r.resident == {0, 2, 3, 4, 5, 6}
    r.store.broken = set()
    for layer in (1, 0):
        r.acquire(layer, [0, 1, 2, 3])


@pytest.mark.parametrize("slots", [3, 13, 10**6, -1])
def test_an_impossible_size_changes_nothing(rig, slots):
    r = rig(slots=(6,), reserved=(12,))
    r.acquire(0, [0, 1, 2])
    free = r.memory.pool.free
    with pytest.raises(CapacityError):
        r.pager.resize(0, slots)
    r.check()
    assert (r.table.slots, r.memory.pool.free, r.resident) == ([6], free, {0, 1, 2})


def test_a_size_beyond_the_budget_changes_nothing(rig):
    r = rig(slots=(6,), reserved=(12,), frames=frames_for(PAGE_CLASS, 7, FRAME))
    r.acquire(0, [0, 1, 2])
    with pytest.raises(OutOfFramesError, match="experts asked for"):
        r.pager.resize(0, 12)
    r.check()
    r.pager.resize(0, 7)
    r.check()


def test_a_size_that_the_system_refuses_changes_nothing(rig):
    substrate = FaultySubstrate(frames_of_memory(60))
    r = rig(slots=(6,), reserved=(12,), substrate=substrate)
    r.acquire(0, [0, 1, 2])
    free = r.memory.pool.free
    # The first part grows; the second fails.
    substrate.plan.arm("commit", SubstrateError("injected fault"), nth=2)
    with pytest.raises(SubstrateError, match="injected"):
        r.pager.resize(0, 12)
    r.check()
    assert (r.table.slots, r.tenant.slots, r.memory.pool.free) == ([6], [6], free)
    r.acquire(1, [0, 1, 2, 3])
    r.pager.resize(0, 12)
    r.check()


@pytest.mark.parametrize("site", ["decommit", "release"])
@pytest.mark.parametrize("part", [1, 2])
def test_memory_that_the_system_does_not_take_back_is_still_in_the_books(rig, site, part):
    substrate = FaultySubstrate(frames_of_memory(60))
    r = rig(slots=(12,), substrate=substrate)
    r.acquire(0, [0, 1, 2, 3])
    substrate.plan.arm(site, SubstrateError("injected fault"), nth=part)
    with pytest.raises(SubstrateError, match="injected"):
        r.pager.resize(0, 4)
    r.check()
    assert r.table.slots == r.tenant.slots == [12]
    assert r.tenant.frames == frames_for(PAGE_CLASS, 12, FRAME)
    r.acquire(1, [0, 1, 2, 3])
    r.pager.resize(0, 4)
    assert r.tenant.frames == frames_for(PAGE_CLASS, 4, FRAME)
    r.pager.resize(0, 12)
    r.check()
    r.acquire(1, [0, 1, 2, 3])


def test_a_bank_cannot_grow_beyond_its_own_reserve(rig):
    r = rig(slots=(4, 4), reserved=(6, 12), bank_of=[0, 1, 1])
    with pytest.raises(CapacityError, match="only 6 are reserved in bank 0"):
        r.pager.resize(0, 7)
    r.check()
    r.pager.resize(1, 7)
    r.check()


@host_only
def test_a_resize_waits_for_prefetches_into_the_slots_that_go(rig):
    r = rig(slots=(8,), prefetch=NextLayer(), threads=1)
    r.store.hold(4)
    r.acquire(0, [0, 1, 2, 3])
    r.store.wait_until_reading(4)
    assert r.table.books.slot_of[[4, 5, 6, 7]].tolist() == [4, 5, 6, 7]
    resize = threading.Thread(target=r.pager.resize, args=(0, 4))
    resize.start()
    resize.join(0.05)
    waited, frames = resize.is_alive(), r.tenant.frames
    r.store.let_go(4)
    resize.join(10)
    assert waited  # a copy into unmapped memory would end the process
    assert frames == frames_for(PAGE_CLASS, 8, FRAME)
    r.check()
    assert not r.transfer.busy
    r.acquire(1, [0, 1, 2, 3])


# --- reset and close -----------------------------------------------------------------------------


@threads
def test_reset_starts_cold_in_the_middle_of_prefetches(rig, threads):
    r = rig(slots=(9,), prefetch=NextLayer(), threads=threads)
    r.acquire(0, [0, 1])
    r.pager.reset()
    r.check()
    assert r.resident == set()
    assert r.pager.counters().accesses == 0
    r.acquire(2, [3])
    r.acquire(0, [0, 1, 2, 3])
    assert r.pager.counters().prefetch_hits == 4


def test_close_is_idempotent(rig):
    r = rig(threads=1)
    r.acquire(0, [0])
    r.close()
    r.close()
    assert r.memory.pool.free == r.memory.pool.count


def test_check_notices_that_table_and_arenas_disagree(rig):
    r = rig(slots=(6,), reserved=(12,))
    r.table.resize(0, 5)
    with pytest.raises(InvariantError, match="different numbers of slots"):
        r.pager.check()


def test_an_expert_that_does_not_exist_is_an_error_and_nothing_else(rig):
    r = rig(eviction=_Strict())
    r.acquire(0, [1])
    with pytest.raises(IndexError):
        r.acquire(1, [0, 4])
    r.check()
    assert r.resident == {1}
    r.acquire(1, [0])


class _Strict(fluxmoe.EvictionPolicy):
    def score(self, view, pages):
        return view.last_use[pages]
