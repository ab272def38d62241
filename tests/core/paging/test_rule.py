"""The event rule, point by point: tests quote sentences of docs/concepts/event-rule.md."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fluxmoe
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.types import Geometry
from fluxmoe.errors import CapacityError
from fluxmoe.policies.eviction.immediate import Immediate
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.policies.prefetch.next_layer import NextLayer
from tests.core.rig import rule_for

E = 4  # experts per layer
NO_SLOTS = np.zeros(0, np.int32)


class Watching(LeastRecentlyUsed):
    """LRU that records its hook calls."""

    def __init__(self):
        self.log = []

    def on_access(self, view, access):
        self.log.append(("access", view.event, access))

    def on_load(self, view, pages):
        self.log.append(("load", view.event, pages.tolist()))

    def on_evict(self, view, pages):
        self.log.append(("evict", view.event, pages.tolist()))


class Fetch(fluxmoe.PrefetchPolicy):
    """A prefetch policy that proposes the pages given by the test, once."""

    def __init__(self):
        self.wish: list[int] = []

    def propose(self, view, access):
        wish, self.wish = self.wish, []
        return np.array(wish, np.int64)


def make(slots=6, *, layers=4, eviction=None, prefetch=None, **options) -> EventRule:
    table = PageTable(Geometry(layers, E), [slots], **options)
    return rule_for(table, eviction, prefetch, strict=True)


def run(rule: EventRule, layer: int, *ids: int) -> None:
    rule.run(0, layer, np.array(ids, np.int32))
    rule.table.check()


def resident(rule: EventRule) -> list[int]:
    return np.flatnonzero(rule.table.resident).tolist()


def counts(rule: EventRule, *names: str) -> list[int]:
    return [getattr(rule.table.counters(), name) for name in names]


# --- 1 -------------------------------------------------------------------------------------------


def test_1_an_event_is_the_set_of_distinct_experts_in_ascending_order_padding_masked():
    rule = make(eviction=(policy := Watching()))
    rule.run(5, 1, np.array([3, -1, 0, 3, 3, -1, 0], np.int64))
    access = policy.log[0][2]
    assert access.pages.tolist() == [E + 0, E + 3]
    assert access.tokens.tolist() == [2, 3]
    assert (access.step, access.layer) == (5, 1)
    assert counts(rule, "events", "accesses") == [1, 2]


def test_1_an_event_of_nothing_but_padding_is_an_event_with_no_pages():
    rule, slots = make(), np.full(3, -7, np.int32)
    assert rule.open(0, 0, np.full(3, -1, np.int32), slots) == 0
    assert slots.tolist() == [0, 0, 0]
    rule.admit()
    assert counts(rule, "events", "accesses", "hits", "misses") == [1, 0, 0, 0]


def test_1_event_counts_from_0():
    rule = make(eviction=(policy := Watching()))
    run(rule, 0, 1)
    run(rule, 1, 2)
    assert [event for kind, event, _ in policy.log if kind == "access"] == [0, 1]
    assert rule.table.books.last_use[[1, E + 2]].tolist() == [0, 1]


def test_1_warm_up_runs_are_followed_by_reset_books_and_counters_start_cold():
    def trace(rule):
        for layer, ids in [(0, (0, 1, 2)), (1, (3, 1)), (2, (0, 1)), (0, (0, 3)), (1, (1, 2))]:
            run(rule, layer, *ids)
        books = rule.table.books
        return rule.table.counters(), *(
            a.tolist() for a in (books.slot_of, books.last_use, books.use_count, books.loaded_at)
        )

    cold, warmed = make(prefetch=NextLayer()), make(prefetch=NextLayer())
    for layer in (3, 2, 1, 0, 3):
        run(warmed, layer, 0, 1, 2, 3)
    warmed.reset()
    assert trace(warmed) == trace(cold)


# --- 2 -------------------------------------------------------------------------------------------


def test_2_hits_are_the_pages_resident_at_the_events_start_the_others_are_misses():
    rule = make(eviction=(policy := Watching()))
    run(rule, 0, 0, 1)
    run(rule, 0, 1, 2, 1)
    access = policy.log[-2][2]
    assert access.pages.tolist() == [1, 2]
    assert access.hit.tolist() == [True, False]
    assert counts(rule, "accesses", "hits", "misses") == [4, 1, 3]


def test_2_residency_is_logical_from_the_moment_a_slot_is_assigned():
    rule = make()
    rule.open(0, 0, np.array([2]), NO_SLOTS)
    rule.admit()  # no page is ever copied here
    slots = np.zeros(2, np.int32)
    assert rule.open(0, 0, np.array([2, 2]), slots) == 0
    assert slots.tolist() == [0, 0]


# --- 3 -------------------------------------------------------------------------------------------


def test_3_all_of_the_events_pages_get_last_use_and_use_count_and_on_access_runs():
    class Looks(LeastRecentlyUsed):
        def on_access(self, view, access):
            self.seen = (
                view.last_use[access.pages].tolist(),
                view.use_count[access.pages].tolist(),
                view.resident[access.pages].tolist(),
            )

    rule = make(eviction=(policy := Looks()))
    run(rule, 0, 0, 1)
    run(rule, 0, 1, 3)
    # Counts are updated, but nothing is loaded.
    assert policy.seen == ([1, 1], [2, 1], [True, False])


def test_3_use_count_survives_eviction():
    rule = make(slots=4)
    run(rule, 0, 0)
    run(rule, 1, 0, 1, 2, 3)
    assert resident(rule) == [4, 5, 6, 7]
    run(rule, 0, 0)
    assert rule.table.books.use_count[0] == 2


# --- 4 -------------------------------------------------------------------------------------------


def test_4_the_missing_number_of_victims_is_taken_lowest_score_first():
    rule = make(slots=5, eviction=(policy := Watching()))
    run(rule, 0, 0, 1)
    run(rule, 1, 0)
    run(rule, 0, 1)
    run(rule, 2, 0, 1, 2)  # two slots are free, and one more is needed
    assert [pages for kind, _, pages in policy.log if kind == "evict"] == [[0]]
    assert resident(rule) == [1, 4, 8, 9, 10]
    assert counts(rule, "evictions") == [1]


def test_4_ties_by_lowest_page_id():
    for stable in (True, False):

        class Indifferent(fluxmoe.EvictionPolicy):
            stable_score = stable

            def score(self, view, pages):
                return np.zeros(len(pages), np.int8)

        rule = make(slots=6, eviction=Indifferent())
        run(rule, 2, 1, 3)
        run(rule, 0, 3)
        run(rule, 1, 0)
        run(rule, 3, 0, 1, 2, 3)  # two slots are missing: 3 and 4 are evicted
        assert resident(rule) == [9, 11, 12, 13, 14, 15]


def test_4_victims_are_not_of_this_event():
    rule = make(slots=4)
    run(rule, 0, 0)
    for layer in (1, 2, 3):
        run(rule, layer, 0)
    run(rule, 0, 0, 1)  # page 0 is the least recently used until this event
    assert resident(rule) == [0, 1, 8, 12]


def test_4_victims_are_of_the_banks_pages():
    table = PageTable(Geometry(4, E), [4, 4], bank_of=[0, 0, 1, 1])
    rule = rule_for(table)
    run(rule, 0, 0, 1, 2)
    run(rule, 2, 0)
    run(rule, 1, 0, 1)
    assert resident(rule) == [1, 2, 4, 5, 8]


@pytest.mark.parametrize("scores", [[np.inf, -np.inf, 0.0], [2**62, -(2**62), 5]])
def test_4_scores_may_be_infinite_or_large(scores):
    class Given(fluxmoe.EvictionPolicy):
        def score(self, view, pages):
            assert pages.tolist() == [0, 1, 2]
            return scores

    rule = make(slots=4, eviction=Given())
    run(rule, 0, 0, 1, 2)
    run(rule, 1, 0, 1)
    assert resident(rule) == [0, 2, 4, 5]


# --- 5 -------------------------------------------------------------------------------------------


def test_5_misses_take_slots_and_are_loaded_in_ascending_page_id_loaded_at_is_event():
    rule = make(eviction=(policy := Watching()))
    run(rule, 1, 2)
    rule.open(0, 0, np.array([3, 1, 0]), NO_SLOTS)
    rule.admit()
    (loads,) = rule.loads()
    assert loads.pages.tolist() == [0, 1, 3]
    assert loads.slots.tolist() == [1, 2, 3]
    assert policy.log[-1] == ("load", 1, [0, 1, 3])
    assert rule.table.books.loaded_at[[0, 1, 3, 6]].tolist() == [1, 1, 1, 0]
    assert counts(rule, "loads_demand") == [4]


# --- 6 -------------------------------------------------------------------------------------------


def test_6_the_events_pages_stay_pinned_until_the_next_event_begins_then_those_not_retained_go():
    rule = make(eviction=Immediate())
    run(rule, 0, 0, 1)
    assert resident(rule) == [0, 1]
    assert counts(rule, "released", "evictions") == [0, 0]
    run(rule, 0, 1)  # page 1 is released before this event begins: a miss
    assert resident(rule) == [1]
    assert counts(rule, "hits", "released", "evictions") == [0, 2, 0]


def test_6_only_pages_that_are_not_retained_leave():
    class EvenStay(LeastRecentlyUsed):
        def retain(self, view, access):
            return access.pages % 2 == 0

    rule = make(eviction=EvenStay())
    run(rule, 0, 0, 1, 2, 3)
    run(rule, 1)
    assert resident(rule) == [0, 2]
    run(rule, 0, 0, 3)  # page 0 hits, and `retain` decides on it again
    run(rule, 1)
    assert resident(rule) == [0, 2]
    assert counts(rule, "released", "hits") == [3, 1]


# --- 7 -------------------------------------------------------------------------------------------


def test_7_proposals_in_order_take_free_slots_then_victims():
    rule = make(slots=5, prefetch=(fetch := Fetch()), eviction=(policy := Watching()))
    run(rule, 0, 0, 1)
    run(rule, 1, 0)
    fetch.wish = [15, 8, 13]  # one slot is free, and pages 0 and 1 may be evicted
    run(rule, 1, 1)
    assert [pages for kind, _, pages in policy.log if kind == "evict"] == [[0, 1]]
    assert policy.log[-1] == ("load", 2, [15, 8, 13])
    (loads,) = rule.loads()
    assert loads.pages.tolist() == [15, 8, 13]
    assert counts(rule, "loads_prefetch", "evictions", "accesses") == [3, 2, 4]


def test_7_where_slots_are_short_the_least_urgent_proposals_are_dropped():
    rule = make(slots=4, prefetch=(fetch := Fetch()))
    fetch.wish = [15, 8, 13]
    run(rule, 0, 0, 1)
    assert resident(rule) == [0, 1, 8, 15]


def test_7_this_events_and_already_prefetched_pages_are_protected():
    rule = make(slots=4, prefetch=(fetch := Fetch()))
    fetch.wish = [8, 9]
    run(rule, 0, 0, 1)
    fetch.wish = [12, 13, 14]  # only 0 and 1 may be evicted
    run(rule, 1)
    assert resident(rule) == [8, 9, 12, 13]


def test_7_a_prefetched_page_is_protected_until_its_layers_next_event():
    rule = make(slots=4, prefetch=(fetch := Fetch()))
    fetch.wish = [8, 9]
    run(rule, 0, 0)
    run(rule, 1, 0)
    run(rule, 1, 1)  # full: 0 is evicted, not 8 or 9, which were never used
    assert resident(rule) == [4, 5, 8, 9]
    run(rule, 2, 0)  # layer 2 has run: 9 is no longer protected
    run(rule, 1, 0, 2)
    assert resident(rule) == [4, 5, 6, 8]


def test_7_a_proposal_that_is_resident_is_protected_too():
    rule = make(slots=4, prefetch=(fetch := Fetch()))
    run(rule, 2, 0)
    fetch.wish = [8, 12]
    run(rule, 0, 0)
    run(rule, 0, 1)
    run(rule, 0, 2)
    assert resident(rule) == [1, 2, 8, 12]
    assert counts(rule, "loads_prefetch") == [1]


def test_7_an_event_that_could_not_be_held_otherwise_takes_protected_pages():
    rule = make(slots=4, prefetch=(fetch := Fetch()))
    fetch.wish = [8, 9, 10]
    run(rule, 0, 0)
    run(rule, 1, 0, 1, 2)
    assert resident(rule) == [4, 5, 6, 10]
    assert counts(rule, "evictions") == [3]


def test_7_a_prefetched_page_counts_as_a_hit_when_used_in_a_counter_of_its_own():
    rule = make(prefetch=(fetch := Fetch()))
    fetch.wish = [4, 5]
    run(rule, 0, 0)
    run(rule, 1, 0)
    run(rule, 1, 0)  # a hit like any other
    assert counts(rule, "hits", "prefetch_hits", "loads_prefetch") == [2, 1, 2]


def test_7_next_layer_fetches_whole_layers_ahead_and_wraps():
    rule = make(slots=16, prefetch=NextLayer(2))
    run(rule, 3, 1)
    assert resident(rule) == [0, 1, 2, 3, 4, 5, 6, 7, 13]
    single = make(slots=4, layers=1, prefetch=NextLayer(2))
    run(single, 0, 1)
    assert resident(single) == [1]


# --- 8 -------------------------------------------------------------------------------------------


def test_8_without_waves_a_bank_has_at_least_the_slots_of_one_layers_experts():
    with pytest.raises(CapacityError, match="at least 4 slots"):
        make(slots=3)
    rule = make(slots=4, prefetch=NextLayer(3))
    for layer in (0, 1, 2, 3, 0):
        run(rule, layer, 0, 1, 2, 3)
        assert set(range(layer * E, layer * E + E)) <= set(resident(rule))


def test_8_a_simulated_capacity_below_the_largest_event_is_an_error():
    rule = make(slots=2, minimum=2)
    run(rule, 0, 0, 1)
    with pytest.raises(CapacityError, match="3 experts does not fit into 2 slots"):
        run(rule, 1, 0, 1, 2)


def in_waves(rule: EventRule, layer: int, *tokens: tuple[int, ...]) -> None:
    ids = np.array(tokens, np.int64)
    starts = np.zeros(ids.shape, np.bool_)
    starts[:, 0] = True
    rule.run(0, layer, ids.ravel(), starts=starts.ravel())
    rule.table.check()


def test_8_an_expert_counts_once_per_event_as_hit_or_miss_further_loads_are_reloads():
    rule = make(slots=2, minimum=2)
    run(rule, 0, 1)
    in_waves(rule, 0, (0, 1), (2, 3), (1, 2))  # order: (0, 1), (1, 2), (2, 3)
    assert counts(rule, "accesses", "hits", "misses", "reloads") == [5, 1, 4, 0]
    in_waves(rule, 0, (0, 1), (2, 3), (3, 0))  # order: (0, 1), (0, 3), (2, 3)
    assert resident(rule) == [2, 3]
    # Pages 2 and 3 were hits, were evicted for pages 0 and 1, and were loaded again.
    assert counts(rule, "accesses", "hits", "misses", "reloads") == [9, 3, 6, 2]
    assert counts(rule, "loads_demand") == [6]
    assert rule.table.books.use_count[:4].tolist() == [2, 3, 2, 2]


def test_8_all_other_pages_of_the_bank_give_way_even_protected_ones():
    fetch, policy = Fetch(), Watching()
    rule = rule_for(PageTable(Geometry(2, 6), [4], minimum=2), policy, fetch)
    fetch.wish = [6, 7]
    run(rule, 0, 0)
    in_waves(rule, 0, (0, 1), (2, 3), (4, 5), (0, 5))
    assert len(resident(rule)) == 4
    assert set(resident(rule)) <= set(range(6))
    # Page 0 was a hit, and is no longer needed when another page needs its slot.
    assert [pages for kind, _, pages in policy.log if kind == "evict"] == [[6, 7], [0]]


def test_8_policies_see_one_event_and_the_pages_that_it_leaves_behind():
    rule = make(slots=2, minimum=2, eviction=(policy := Watching()))
    run(rule, 0, 0, 1)
    policy.log.clear()
    in_waves(rule, 0, (0, 1), (2, 3), (1, 2))
    kinds = [(kind, event) for kind, event, _ in policy.log]
    assert kinds == [("access", 1), ("evict", 1), ("load", 1)]
    assert policy.log[1][2] == [0, 1]
    assert policy.log[2][2] == resident(rule) == [2, 3]
    access = policy.log[0][2]
    assert access.pages.tolist() == [0, 1, 2, 3]
    assert access.tokens.tolist() == [1, 2, 2, 1]
    assert access.hit.tolist() == [True, True, False, False]


def test_8_pages_that_are_not_retained_leave_if_they_are_still_there():
    rule = make(slots=2, minimum=2, eviction=Immediate())
    in_waves(rule, 0, (0, 1), (2, 3))
    run(rule, 1)
    assert resident(rule) == []
    assert counts(rule, "evictions", "released") == [2, 2]


def test_8_without_waves_an_event_that_does_not_fit_is_an_error():
    rule = make(slots=2, minimum=2)
    with pytest.raises(CapacityError, match="3 experts does not fit into 2 slots"):
        run(rule, 1, 0, 1, 2)
    with pytest.raises(CapacityError, match="experts of one token do not fit into 2 slots"):
        in_waves(rule, 1, (0, 1, 2))


# --- the rule as a callable ----------------------------------------------------------------------


def test_slots_answer_every_id_and_padding_gets_slot_0():
    rule = make()
    run(rule, 0, 0, 1, 2)
    slots = np.full(6, -7, np.int32)
    assert rule.open(0, 0, np.array([2, -1, 0, 1, 2, -5]), slots) == 0
    assert slots.tolist() == [2, 0, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("layer", "ids", "slots"),
    [
        (0, [0, 4], 0),  # an expert of the next layer: beyond the arrays
        (0, [2**40], 0),
        (4, [0], 0),
        (-1, [0], 0),
        (0, [0, 1], 3),  # compiled code would read beyond the ids
    ],
)
def test_what_does_not_exist_is_refused_before_the_event_begins(layer, ids, slots):
    rule = make(eviction=Immediate())
    run(rule, 0, 0)
    before = rule.table.counters()
    with pytest.raises(IndexError):
        rule.open(0, layer, np.array(ids), np.zeros(slots, np.int32))
    assert rule.table.counters() == before
    rule.table.check()
    run(rule, 0, 1)
    assert rule.table.counters() == replace(
        before, events=2, accesses=2, misses=2, loads_demand=2, released=1, cold=2
    )


def test_int32_and_int64_ids_are_the_same_event():
    one, other = make(), make()
    one.run(0, 0, np.array([0, 2, -1], np.int32))
    other.run(0, 0, np.array([0, 2, -1], np.int64))
    assert one.table.counters() == other.table.counters()
    assert resident(one) == resident(other)
