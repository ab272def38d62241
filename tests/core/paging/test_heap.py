"""The victim heap compared with sorting, for scores that rise, fall, tie and are infinite."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmoe.core.paging import heap
from fluxmoe.core.paging.books import EVENT, LOADED, PROTECTED, load, unload
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.types import Geometry

LAYERS, EXPERTS = 3, 4
PAGES = LAYERS * EXPERTS

scores = st.one_of(
    st.integers(-3, 3).map(float),  # so that there are many ties
    st.sampled_from([float("inf"), float("-inf"), 0.5, -0.0]),
)


class Both:
    """A heap and its reference."""

    def __init__(self, banks: int, experts: int = EXPERTS) -> None:
        self.experts, self.pages = experts, LAYERS * experts
        self.table = PageTable(
            Geometry(LAYERS, experts),
            [self.pages] * banks,
            bank_of=[layer % banks for layer in range(LAYERS)],
        )
        self.books = self.table.books
        self.heap = heap.new_heap(self.pages, *self.books.page_at.shape)
        self.truth: dict[int, float] = {}

    def score(self, changes: dict[int, float]) -> None:
        """Load absent pages and give every page a score."""
        for page in changes:
            if page not in self.truth:
                self.books.now[LOADED] = 0
                load(self.books, page)
        self.truth.update(changes)
        pages = np.array(sorted(changes), np.int64)
        heap.update(self.heap, self.books, pages, np.array([changes[p] for p in sorted(changes)]))
        self.check()

    def drop(self, page: int) -> None:
        """Remove a page without notifying the heap."""
        if self.truth.pop(page, None) is not None:
            unload(self.books, page)

    def choose(self, bank: int, count: int, running: set[int], held: set[int], protect: bool):
        self.books.now[EVENT] += 1
        self.books.last_use[sorted(running)] = self.books.now[EVENT]
        self.books.flags[...] &= ~np.uint8(PROTECTED)
        self.books.flags[sorted(held & self.truth.keys())] |= PROTECTED
        spared = running | (held if protect else set())
        expected = sorted(
            (score, page)
            for page, score in self.truth.items()
            if page not in spared and self.table.bank(page // self.experts) == bank
        )[:count]
        out = np.full(count, -1, np.int64)
        found = heap.choose(self.heap, self.books, bank, count, protect, out)
        assert out[:found].tolist() == [page for _, page in expected]
        for page in out[:found].tolist():
            self.drop(page)
        self.check()

    def check(self):
        """Assert that every bound has an entry, and that every page up to the limit has a bound."""
        h = self.heap
        for bank in range(self.table.num_banks):
            limit, (begin, end) = (h.limit[bank], h.limit_page[bank]), h.queue_ends[bank]
            kept = set(zip(h.key[bank, : h.size[bank]], h.page[bank], strict=False))
            kept |= set(zip(h.queue_key[bank, begin:end], h.queue_page[bank, begin:], strict=False))
            for page in range(self.pages):
                if self.table.bank(page // self.experts) != bank:
                    continue
                bound, score = h.bound[page], self.truth.get(page)
                assert bound == heap.NONE or (bound, page) in kept
                if score is not None and (heap.as_integer(score), page) <= limit:
                    assert bound <= heap.as_integer(score)


pages = st.integers(0, PAGES - 1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("score"), st.dictionaries(pages, scores, min_size=1)),
        st.tuples(st.just("drop"), pages),
        st.tuples(
            st.just("choose"),
            st.integers(0, 1),
            st.integers(1, PAGES),
            st.sets(pages, max_size=4),
            st.sets(pages, max_size=4),
            st.booleans(),
        ),
    ),
    max_size=40,
)


@given(st.integers(1, 2), operations)
@settings(max_examples=300)
def test_victims_are_those_of_a_sort(banks, operations):
    both = Both(banks)
    for name, *args in operations:
        if name == "choose":
            args[0] %= banks
        getattr(both, name)(*args)
    for bank in range(banks):
        both.choose(bank, PAGES, set(), set(), False)


@given(st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_falling_scores_fill_the_heap_and_compaction_loses_nothing(random):
    both = Both(1)
    both.score({page: 1000.0 for page in range(PAGES)})
    capacity, fullest, shrank = both.heap.key.shape[1], 0, 0
    for turn in range(60):
        before = int(both.heap.size[0])
        chosen = random.sample(range(PAGES), 3)
        both.score({page: 900.0 - turn - random.randrange(3) for page in chosen})
        size = int(both.heap.size[0])
        fullest, shrank = max(fullest, size), shrank + (size < before)
        if turn % 20 == 19:
            both.choose(0, 2, set(chosen), {random.randrange(PAGES)}, True)
    assert fullest <= capacity
    assert shrank >= 2, "the heap was never compacted: the test proves nothing"
    both.choose(0, PAGES, set(), set(), False)


def test_rising_scores_cost_no_entries():
    both = Both(1)
    both.score({page: float(-page) for page in range(PAGES)})
    for turn in range(1, 50):
        both.score({page: float(turn - page) for page in range(PAGES)})
    assert both.heap.size[0] == PAGES - 1  # only the first page's scores, the highest, are queued
    both.choose(0, 5, {1}, set(), False)


@given(st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_scores_in_ascending_order_need_no_heap(random):
    both = Both(1, experts=60)
    both.score({page: float(page) for page in range(both.pages)})
    room, fullest, dropped = both.heap.queue_key.shape[1], 0, 0
    for turn in range(150):
        before = int(both.heap.queue_ends[0, 1])
        used = random.sample(range(both.pages), 12)
        both.score(dict.fromkeys(used, 1000.0 + turn))
        end = int(both.heap.queue_ends[0, 1])
        fullest, dropped = max(fullest, end), dropped + (end < before)
        if turn % 3 == 0:
            both.choose(0, 5, set(used), set(), False)
            assert both.heap.limit[0] == heap.NONE
    assert fullest <= room
    assert dropped >= 1, "the queue was never full: the test proves nothing"
    both.choose(0, both.pages, set(), set(), False)


def test_ascending_scores_take_over_from_a_heap_with_a_limit():
    both = Both(1, experts=60)
    both.score({page: float(-page) for page in range(both.pages)})
    both.choose(0, 1, set(), set(), False)
    assert both.heap.limit[0] < heap.NONE, "the heap holds all pages: the test proves nothing"
    for turn in range(1, both.pages + 1):
        page = turn - 1
        both.score({page: float(turn)})
        both.choose(0, 1, {page}, set(), False)
    assert both.heap.limit[0] == heap.NONE and both.heap.size[0] == 0
    both.choose(0, both.pages, set(), set(), False)


def test_a_page_that_left_unnoticed_and_came_back_is_ordered_by_its_new_score():
    for new in (0.0, 5.0, 9.0):
        both = Both(1)
        both.score({0: 5.0, 1: 6.0, 2: 7.0})
        both.drop(0)
        both.score({0: new})
        both.choose(0, 3, set(), set(), False)


def test_a_page_whose_entry_was_dropped_while_it_was_absent_gets_another():
    for scores in ({0: 5.0, 1: 6.0, 2: 7.0}, {2: 7.0, 1: 6.0, 0: 5.0}):
        for new in (0.0, 5.0, 9.0):
            both = Both(1)
            for page, score in scores.items():  # ascending scores are queued; others enter the heap
                both.score({page: score})
            both.drop(0)
            both.choose(0, 1, set(), set(), False)  # skips 0
            both.score({0: new})
            both.choose(0, 2, set(), set(), False)


@given(st.integers(1, 2), st.integers(0, 2**32), st.sampled_from(["few", "many", "rising"]))
@settings(max_examples=60, deadline=None)
def test_a_large_bank_keeps_a_part_in_the_heap_and_chooses_as_a_sort(banks, seed, values):
    rng = np.random.default_rng(seed)
    both = Both(banks, experts=150)
    partial = 0
    for turn in range(40):
        chosen = rng.choice(both.pages, rng.integers(1, 120), replace=False).tolist()
        drawn = {
            "few": rng.integers(0, 3, len(chosen)),
            "many": rng.normal(size=len(chosen)),
            "rising": np.full(len(chosen), turn),
        }[values]
        both.score(dict(zip(chosen, drawn.astype(float).tolist(), strict=True)))
        running = set(rng.choice(chosen, min(3, len(chosen)), replace=False).tolist())
        held = set(rng.choice(both.pages, 20).tolist())
        both.choose(turn % banks, int(rng.integers(1, 60)), running, held, bool(turn % 3))
        partial += int((both.heap.limit_page < both.pages).any())
        for page in rng.choice(both.pages, 2).tolist():
            both.drop(page)
    for bank in range(banks):
        both.choose(bank, both.pages, set(), set(), False)
    assert partial or banks == 2 or values == "rising"


def test_clear_empties_the_heap():
    both = Both(1)
    both.score({0: 1.0, 1: 2.0})
    heap.clear(both.heap)
    out = np.zeros(2, np.int64)
    assert heap.choose(both.heap, both.books, 0, 2, False, out) == 0
    both.truth = {1: 2.0}
    both.score({1: 3.0})
    both.choose(0, 2, set(), set(), False)


def test_integers_are_in_the_order_of_the_scores():
    inf, tiny = np.inf, 5e-324
    scores = [-inf, -1e308, -2.0, -1.5, -1.0, -tiny, 0.0, tiny, 1.0, 1.5, 2.0**53, 1e308, inf]
    numbers = [heap.as_integer(score) for score in scores]
    assert numbers == sorted(set(numbers)) and numbers[-1] < heap.NONE
    assert heap.as_integer(-0.0) == heap.as_integer(0.0) == 0
