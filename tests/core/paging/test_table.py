from __future__ import annotations

import numpy as np
import pytest

from fluxmoe.core.paging.books import load, release_leaving, unload
from fluxmoe.core.paging.measures import REUSE_EVERY, PageAges
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.types import AGES, IDLE, LIFETIME, REUSE, Geometry
from fluxmoe.errors import CapacityError, InvariantError
from fluxmoe.policies.eviction.immediate import Immediate
from tests.core.rig import rule_for


def table(slots=(6,), **options) -> PageTable:
    return PageTable(Geometry(3, 4), slots, **{"reserved": 12} | options)


def fill(table: PageTable, *pages: int) -> None:
    for page in pages:
        table.books.now[5] = 0  # LOADED: as at the beginning of an event
        load(table.books, page)


def slot_of(table: PageTable, *pages: int) -> list[int]:
    return table.books.slot_of[list(pages)].tolist()


def test_slots_are_given_out_from_the_lowest():
    t = table()
    fill(t, 7, 3, 9)
    assert slot_of(t, 7, 3, 9) == [0, 1, 2]
    assert t.expert_table.tolist() == [[-1, -1, -1, 1], [-1, -1, -1, 0], [-1, 2, -1, -1]]
    assert np.flatnonzero(t.resident).tolist() == [3, 7, 9]
    t.check()


def test_shrinking_keeps_the_pages_in_low_slots_where_they_are():
    t = table()
    fill(t, 5, 2, 8, 0, 11, 7)
    t.resize(0, 4)
    assert slot_of(t, 5, 2, 8, 0, 11, 7) == [0, 1, 2, 3, -1, -1]
    assert t.counters().resized == 2
    assert t.slots == [4]
    t.check()


def test_shrinking_keeps_free_low_slots_usable_and_drops_free_high_ones():
    t = table()
    fill(t, 5, 2, 8, 0, 11)
    unload(t.books, 2)
    t.resize(0, 4)
    t.check()
    fill(t, 6)
    assert slot_of(t, 5, 6, 8, 0) == [0, 1, 2, 3]
    assert t.books.num_free[0] == 0


def test_growing_gives_out_the_old_low_slots_first():
    t = table([4])
    fill(t, 1, 2)
    t.resize(0, 7)
    t.check()
    fill(t, 3, 4, 5)
    assert slot_of(t, 1, 2, 3, 4, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("slots", "what", "fix"), [(3, "3 slots", "at least 4"), (13, "13 slots", "at most 12")]
)
def test_an_impossible_size_is_refused_and_changes_nothing(slots, what, fix):
    t = table()
    fill(t, 1, 2)
    with pytest.raises(CapacityError) as info:
        t.resize(0, slots)
    assert what in info.value.what
    assert fix in info.value.fix
    assert (t.slots, slot_of(t, 1, 2)) == ([6], [0, 1])
    t.check()


def test_a_bank_cannot_be_made_smaller_than_a_layer():
    with pytest.raises(CapacityError, match="3 slots cannot hold the 4 experts"):
        table([3])


def test_a_known_trace_may_need_less_than_a_layer():
    assert table([2], minimum=2).slots == [2]


@pytest.mark.parametrize("bank_of", [[0, 0], [0, 0, 2], [0, -1, 1]])
def test_every_layer_names_a_bank_that_exists(bank_of):
    with pytest.raises(InvariantError, match="bank_of"):
        table([6, 6], bank_of=bank_of)


def test_banks_have_slots_of_their_own():
    t = table([4, 5], bank_of=[0, 1, 1])
    fill(t, 0, 4, 8, 1)
    assert slot_of(t, 0, 1, 4, 8) == [0, 1, 0, 1]
    assert [t.bank(layer) for layer in range(3)] == [0, 1, 1]
    t.resize(1, 4)
    assert (t.slots, slot_of(t, 0, 1, 4, 8)) == ([4, 4], [0, 1, 0, 1])
    t.check()


def test_discard_frees_the_slot_and_is_no_eviction():
    t = table()
    fill(t, 1, 2, 3)
    t.discard(np.array([2, 9]))  # 9 is not resident: no effect
    assert slot_of(t, 1, 2, 3, 9) == [0, -1, 2, -1]
    assert (t.counters().evictions, t.counters().resized) == (0, 0)
    t.check()


def test_a_resize_first_frees_what_the_last_event_left():
    t = table()
    rule = rule_for(t, Immediate())
    rule.run(0, 1, np.array([0, 3]))
    t.resize(0, 5)
    assert not t.resident.any()
    assert (t.counters().released, t.counters().resized) == (2, 0)
    rule.run(0, 2, np.array([1]))
    assert t.counters().released == 2  # not counted twice
    t.check()


def test_what_has_left_is_not_released_again_when_it_is_back():
    t = table()
    rule_for(t, Immediate()).run(0, 1, np.array([0, 3]))
    for _ in range(2):
        release_leaving(t.books)
        assert t.counters().released == 2
        t.discard(np.array([7]))
        fill(t, 7)
    t.resize(0, 5)
    assert np.flatnonzero(t.resident).tolist() == [7]
    t.check()


def test_reset_forgets_everything_but_the_size():
    t = table()
    fill(t, 1, 2, 3)
    t.resize(0, 5)
    t.reset()
    assert not t.resident.any()
    assert t.slots == [5]
    assert t.counters() == table().counters()
    t.check()


def test_check_notices_broken_books():
    for spoil in (
        lambda b: b.slot_of.__setitem__(1, 4),
        lambda b: b.slot_of.__setitem__(5, 3),
        lambda b: b.page_at.__setitem__((0, 4), 7),
        lambda b: b.num_free.__setitem__(0, 2),
        lambda b: b.flags.__setitem__(9, 1),
        lambda b: b.counts.__setitem__(1, 1),
    ):
        t = table()
        fill(t, 1, 2, 3)
        t.check()
        spoil(t.books)
        with pytest.raises(InvariantError):
            t.check()


def test_ages_are_what_a_second_book_says():
    t = table((4,))
    rule = rule_for(t)
    ages = rule.ages = PageAges(rule.table.books)
    rng = np.random.default_rng(0)
    loaded, used = {}, {}
    lifetimes, idles, gaps = [], [], []
    for event in range(4000):
        layer, ids = event % 3, rng.integers(0, 4, 2)
        pages = {layer * 4 + int(i) for i in ids}
        before = set(np.flatnonzero(t.resident).tolist())
        slots = np.zeros(2, np.int32)
        if rule.open(event // 3, layer, ids, slots):
            rule.admit()
            list(rule.loads())
        for page in before - set(np.flatnonzero(t.resident).tolist()):
            lifetimes.append(event - loaded[page])
            idles.append(event - used[page])
        if event % REUSE_EVERY == 0:
            gaps += [event - used[page] for page in pages if page in used]
        loaded |= dict.fromkeys(pages - before, event)
        used |= dict.fromkeys(pages, event)
    for kind, seen in ((LIFETIME, lifetimes), (IDLE, idles), (REUSE, gaps)):
        buckets = np.ceil(np.log2(np.maximum(seen, 1))).astype(int)
        assert ages.counts[kind].tolist() == np.bincount(buckets, minlength=AGES).tolist()
        assert ages.sums[kind] == sum(seen) > 0
    rule.reset()
    assert not ages.counts.any() and not ages.sums.any()
