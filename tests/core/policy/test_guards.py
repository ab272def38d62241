"""Policy faults, which are counted, logged and answered by the default, or raised if strict."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import fluxmoe
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.paging import PageView
from fluxmoe.core.policy.watchdog import Limits
from fluxmoe.core.types import Geometry
from fluxmoe.errors import PolicyFaultError
from fluxmoe.policies.eviction.lfu import LeastFrequentlyUsed
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from tests.core import reference
from tests.core.rig import Kernel, StableKernel, rule_for

LAYERS, E, SLOTS = 4, 6, 9


def make(policy, *, prefetch=None, strict=False, strikes=16, slots=SLOTS) -> EventRule:
    table = PageTable(Geometry(LAYERS, E), [slots])
    limits = Limits(strikes=strikes)
    return rule_for(table, policy, prefetch, name="pony", strict=strict, limits=limits)


def trace(events: int = 60, seed: int = 3):
    rng = np.random.default_rng(seed)
    for event in range(events):
        yield event % LAYERS, rng.integers(-1, E, 7)


def replay(rule: EventRule, events: int = 60) -> list[list[int]]:
    history = []
    for layer, ids in trace(events):
        rule.run(0, layer, ids)
        rule.table.check()
        history.append(np.flatnonzero(rule.table.resident).tolist())
    return history


def lru_history(events: int = 60) -> list[list[int]]:
    model = reference.Reference(LAYERS, E, [SLOTS], [0] * LAYERS, reference.lru)
    history = []
    for layer, ids in trace(events):
        model.event(layer, ids.tolist())
        history.append(sorted(model.resident))
    return history


def eviction(method: str, function, *, stable: bool = False) -> fluxmoe.EvictionPolicy:
    """Make LRU with ``method`` replaced by ``function``."""
    cls = type("Pony", (LeastRecentlyUsed,), {method: function, "stable_score": stable})
    return cls()


def fails(self, view, *args):
    raise ZeroDivisionError("four legs")


BAD_SCORES = {
    "raises": (fails, "score raised ZeroDivisionError: four legs"),
    "gives None": (lambda self, view, pages: None, "score returned None"),
    "too few": (
        lambda self, view, pages: np.zeros(len(pages) - 1),
        "score returned float64 of shape",
    ),
    "too many": (
        lambda self, view, pages: np.zeros(len(pages) + 1),
        "score returned float64 of shape",
    ),
    "a number": (lambda self, view, pages: 1.0, "score returned float64 of shape ()"),
    "a column": (lambda self, view, pages: np.zeros((len(pages), 1)), "score returned float64 of"),
    "strings": (lambda self, view, pages: ["x"] * len(pages), "score returned <U1 of shape"),
    "bools": (lambda self, view, pages: pages > 3, "score returned bool of shape"),
    "complex": (lambda self, view, pages: pages * 1j, "score returned complex128 of shape"),
    "ragged": (lambda self, view, pages: [[1], [1, 2]], "score raised ValueError"),
    "NaN": (
        lambda self, view, pages: np.where(pages == pages[-1], np.nan, 1.0),
        "score returned NaN",
    ),
    "writes to the view": (
        lambda self, view, pages: view.last_use.fill(0) or np.zeros(len(pages)),
        "score raised ValueError: assignment destination is read-only",
    ),
    "writes to the candidates": (
        lambda self, view, pages: pages.fill(0) or np.zeros(len(pages)),
        "score raised ValueError: assignment destination is read-only",
    ),
    "asks for the future": (
        lambda self, view, pages: view.next_use[pages],
        "score raised AttributeError: next_use is known only in the simulator",
    ),
}


@pytest.mark.parametrize("stable", [False, True], ids=["scored", "ordered"])
@pytest.mark.parametrize("fault", BAD_SCORES)
def test_a_bad_score_makes_that_call_lru_is_counted_and_reported_once(fault, stable, caplog):
    function, message = BAD_SCORES[fault]
    rule = make(eviction("score", function, stable=stable), strikes=10**6)
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        assert replay(rule) == lru_history()
    assert rule.eviction.faults > 10
    (line,) = caplog.messages
    assert f"eviction policy 'pony': {message}" in line


@pytest.mark.parametrize("stable", [False, True], ids=["scored", "ordered"])
@pytest.mark.parametrize("fault", BAD_SCORES)
def test_strict_raises_and_names_the_policy_as_registered(fault, stable):
    function, message = BAD_SCORES[fault]
    rule = make(eviction("score", function, stable=stable), strict=True)
    with pytest.raises(PolicyFaultError, match="eviction policy 'pony'") as info:
        replay(rule)
    assert message in info.value.what
    assert (info.value.__cause__ is not None) == ("raised" in message)
    assert "strict_policies: false" in info.value.fix and "--contain" in info.value.fix


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64]
)
@pytest.mark.parametrize("stable", [False, True], ids=["scored", "ordered"])
def test_any_integer_or_float_dtype_will_do(dtype, stable):
    policy = eviction(
        "score", lambda self, view, pages: view.last_use[pages].astype(dtype), stable=stable
    )
    assert replay(make(policy, strict=True)) == lru_history()


def test_a_list_will_do():
    policy = eviction("score", lambda self, view, pages: view.last_use[pages].tolist())
    assert replay(make(policy, strict=True)) == lru_history()


def test_candidates_are_ascending_resident_and_not_of_this_event():
    def look(self, view, pages):
        assert np.all(np.diff(pages) > 0)
        assert view.resident[pages].all()
        assert not np.any(view.last_use[pages] == view.event)
        return view.last_use[pages]

    assert replay(make(eviction("score", look), strict=True)) == lru_history()


def test_pages_to_be_ordered_are_ascending_resident_and_not_of_this_event_and_there_are_some():
    shown = []

    def look(self, view, pages):
        assert np.all(np.diff(pages) > 0)
        assert view.resident[pages].all()
        assert not np.any(view.last_use[pages] == view.event)
        shown.append(pages.tolist())
        return view.last_use[pages]

    assert replay(make(eviction("score", look, stable=True), strict=True)) == lru_history()
    assert all(shown)
    shown.clear()
    rule = make(eviction("score", look, stable=True), strict=True, slots=E)
    for layer, ids in [(3, [5]), (1, [2, 0]), (0, [4, 1])]:
        rule.run(0, layer, np.array(ids))
    rule.run(0, 1, np.array([0, 1, 2, 3]))
    assert shown == [[1, 4, 23]]  # sorted
    rule.run(0, 2, np.array([0]))
    assert shown == [[1, 4, 23], [6, 7, 8, 9]]  # only the pages that changed since


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, "select raised ZeroDivisionError"),
        (lambda self, view, pages, n: None, "select returned None"),
        (lambda self, view, pages, n: pages[[0] * n], "select returned a duplicate"),
        (lambda self, view, pages, n: pages[:n] + 10**6, "or a page that was not a candidate"),
        (lambda self, view, pages, n: -1 - pages[:n], "or a page that was not a candidate"),
        (lambda self, view, pages, n: pages[: n + 1], "select returned int64 of shape"),
        (lambda self, view, pages, n: pages[: n - 1], "select returned int64 of shape"),
        (lambda self, view, pages, n: pages[:n].astype(float), "select returned float64 of shape"),
        (lambda self, view, pages, n: pages.sort() or pages[:n], "read-only"),
    ],
)
def test_a_bad_selection_makes_that_call_lru(function, message, caplog):
    # The second event needs several victims, so a repeated page cannot be a valid answer.
    rule = make(eviction("select", function), strikes=10**6, slots=E)
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        rule.run(0, 0, np.arange(E))
        rule.run(0, 1, np.arange(E - 2))
    assert np.flatnonzero(rule.table.resident).tolist() == [4, 5, *range(E, 2 * E - 2)]
    assert rule.eviction.faults == 1
    assert message in caplog.messages[0]
    rule.table.check()


def test_a_good_selection_is_followed():
    policy = eviction("select", lambda self, view, pages, n: pages[-n:].tolist())
    rule = make(policy, strict=True, slots=E)
    rule.run(0, 0, np.arange(E))
    rule.run(0, 1, np.arange(2))
    assert np.flatnonzero(rule.table.resident).tolist() == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, "retain raised ZeroDivisionError"),
        (lambda self, view, access: None, "retain returned None"),
        (lambda self, view, access: np.zeros(99, bool), "retain returned bool of shape (99,)"),
        (lambda self, view, access: np.zeros(len(access.pages), int), "retain returned int64"),
        (lambda self, view, access: False, "retain returned bool of shape ()"),
        (lambda self, view, access: access.pages.fill(0), "read-only"),
        (lambda self, view, access: access.hit.fill(0), "read-only"),
    ],
)
def test_a_bad_retain_keeps_everything(function, message, caplog):
    rule = make(eviction("retain", function), strikes=10**6)
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        assert replay(rule) == lru_history()
    assert rule.table.counters().released == 0
    assert len(caplog.messages) == 1
    assert message in caplog.messages[0]


@pytest.mark.parametrize("hook", ["on_access", "on_load", "on_evict"])
@pytest.mark.parametrize("how", ["raises", "writes"])
def test_a_hook_that_fails_is_contained(hook, how, caplog):
    def writes(self, view, what):
        (what.pages if hook == "on_access" else what)[...] = 0

    function = fails if how == "raises" else writes
    rule = make(eviction(hook, function), strikes=10**6)
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        assert replay(rule) == lru_history()
    assert len(caplog.messages) == 1
    assert f"{hook} raised" in caplog.messages[0]


def test_reset_that_fails_is_contained():
    rule = make(eviction("reset", lambda self: 1 / 0))
    rule.reset()
    assert rule.eviction.faults == 1


def test_after_its_strikes_a_policy_is_replaced(caplog):
    calls = []

    def counts_and_fails(self, view, pages):
        calls.append(view.event)
        raise ValueError("no")

    for stable in (False, True):
        calls.clear()
        caplog.clear()
        rule = make(eviction("score", counts_and_fails, stable=stable), strikes=3)
        with caplog.at_level(logging.WARNING, "fluxmoe"):
            assert replay(rule) == lru_history()
        assert len(calls) == rule.eviction.faults == 3
        assert "policy 'pony' is replaced after 3 faults" in caplog.messages[-1]
        assert rule.eviction.replaced == "score raised ValueError: no"
        rule.reset()
        replay(rule)
        assert len(calls) == 3  # it is replaced permanently


def test_a_replaced_policy_no_longer_releases_pages():
    policy = eviction("retain", lambda self, view, access: np.zeros(len(access.pages), bool))
    type(policy).score = fails
    fetch = _Fetch([12, 13, 14, 15, 16])  # fills the slots, so that the next event must evict
    rule = make(policy, prefetch=fetch, strikes=1, slots=E)
    rule.run(0, 0, np.arange(1))
    rule.run(0, 1, np.arange(1))
    assert (rule.table.counters().released, rule.eviction.faults) == (1, 0)
    assert rule.eviction.replaced == ""
    rule.run(0, 0, np.arange(E))
    assert rule.eviction.faults == 1
    before = rule.table.counters().released
    rule.run(0, 0, np.arange(E))
    rule.run(0, 0, np.arange(E))
    assert rule.table.counters().released == before
    assert rule.table.counters().hits == 2 * E


@pytest.mark.parametrize("failing", range(5, 40, 5))
def test_a_stable_policy_that_fails_once_keeps_a_correct_order_afterwards(failing):
    class SometimesLfu(LeastFrequentlyUsed):
        broken = False

        def score(self, view, pages):
            if self.broken:
                raise RuntimeError("just this once")
            return super().score(view, pages)

    policy = SometimesLfu()
    rule = make(policy)
    model = reference.Reference(LAYERS, E, [SLOTS], [0] * LAYERS, reference.lfu)
    for event, (layer, ids) in enumerate(trace()):
        policy.broken = event == failing
        model.key = reference.lru if policy.broken else reference.lfu
        rule.run(0, layer, ids)
        model.event(layer, ids.tolist())
        assert set(np.flatnonzero(rule.table.resident).tolist()) == model.resident, event
    assert rule.eviction.faults == 1


# --- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "key"), [(Kernel, reference.kernel), (StableKernel, reference.stable_kernel)]
)
def test_a_kernel_is_used_instead_of_score_and_equals_it(policy, key):
    class ByScore(policy):
        score_kernel = None

        def score(self, view, pages):
            return policy().score(view, pages)

    class Forbidden(policy):
        score_kernel = staticmethod(policy.score_kernel)

        def score(self, view, pages):
            raise AssertionError("the kernel takes its place")

    class Derived(Forbidden):
        def score(self, view, pages):  # more derived than the kernel, so it takes precedence
            return policy().score(view, pages)

    model = reference.Reference(LAYERS, E, [SLOTS], [0] * LAYERS, key)
    expected = []
    for layer, ids in trace():
        model.event(layer, ids.tolist())
        expected.append(sorted(model.resident))
    assert replay(make(Forbidden(), strict=True)) == expected
    assert replay(make(ByScore(), strict=True)) == expected
    assert make(Derived()).eviction.kernel is None
    assert replay(make(Derived(), strict=True)) == expected


def test_a_kernel_that_numba_cannot_compile_is_an_error_that_names_the_policy():
    class Dreams(fluxmoe.EvictionPolicy):
        @staticmethod
        def score_kernel(last_use, use_count, loaded_at, event, page):
            return open("weights").read()

    with pytest.raises(PolicyFaultError, match="'pony': numba cannot compile") as info:
        make(Dreams())
    assert "define score" in info.value.fix


def test_a_kernel_of_the_wrong_signature_is_an_error_that_names_the_policy():
    class Short(fluxmoe.EvictionPolicy):
        @staticmethod
        def score_kernel(last_use):
            return last_use

    with pytest.raises(PolicyFaultError, match="'pony'"):
        make(Short())


@pytest.mark.parametrize("problem", ["raises", "NaN"])
def test_a_kernel_that_fails_is_contained(problem, caplog):
    class Raises(fluxmoe.EvictionPolicy):
        @staticmethod
        def score_kernel(last_use, use_count, loaded_at, event, page):
            if page >= 0:
                raise ValueError("four legs")
            return 1.0

    class NotANumber(fluxmoe.EvictionPolicy):
        @staticmethod
        def score_kernel(last_use, use_count, loaded_at, event, page):
            return np.nan

    rule = make(Raises() if problem == "raises" else NotANumber(), strikes=10**6)
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        assert replay(rule) == lru_history()
    assert rule.eviction.faults > 10
    assert len(caplog.messages) == 1


def test_a_policy_that_decides_nothing_says_so():
    rule = make(fluxmoe.EvictionPolicy(), strict=True)
    with pytest.raises(PolicyFaultError, match="has no score, score_kernel or select"):
        replay(rule)


# --- prefetch ------------------------------------------------------------------------------------


class _Fetch(fluxmoe.PrefetchPolicy):
    def __init__(self, answer):
        self.answer = answer

    def propose(self, view, access):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([6, LAYERS * E], "propose returned a page outside 0…23"),
        ([6, -1], "propose returned a page outside 0…23"),
        ([6, 2], "propose returned a page of the current layer"),
        ([6.0, 7.0], "propose returned float64 of shape (2,)"),
        ([[6, 7]], "propose returned int64 of shape (1, 2)"),
        (None, "propose returned None"),
        (["x"], "propose returned <U1 of shape"),
        ([[6], [7, 8]], "propose raised ValueError"),
        (KeyError("k"), "propose raised KeyError"),
    ],
)
def test_a_bad_proposal_is_dropped_whole_counted_and_reported_once(answer, message, caplog):
    rule = make(LeastRecentlyUsed(), prefetch=_Fetch(answer), strikes=3)
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        for _ in range(5):
            rule.run(0, 0, np.array([1, 2]))
    assert rule.table.counters().loads_prefetch == 0
    assert f"prefetch policy 'pony': {message}" in caplog.messages[0]
    assert "replaced after 3 faults" in caplog.messages[1]
    assert len(caplog.messages) == 2
    strict = make(LeastRecentlyUsed(), prefetch=_Fetch(answer), strict=True)
    with pytest.raises(PolicyFaultError, match="'pony'"):
        strict.run(0, 0, np.array([1, 2]))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int64])
def test_repeats_are_taken_once_in_the_order_of_urgency(dtype):
    rule = make(LeastRecentlyUsed(), prefetch=_Fetch(np.array([20, 7, 20, 9, 7, 8], dtype)))
    rule.run(0, 0, np.arange(E))  # of the nine slots, three are still free
    (loads,) = rule.loads()
    assert loads.pages.tolist() == [20, 7, 9]


@pytest.mark.parametrize("nothing", [[], (), np.zeros(0), np.zeros((0, 2))])
def test_proposing_nothing_is_fine(nothing):
    rule = make(LeastRecentlyUsed(), prefetch=_Fetch(nothing), strict=True)
    rule.run(0, 0, np.array([1]))
    assert rule.table.counters().loads_prefetch == 0


def test_prefetch_reset_that_fails_is_contained():
    policy = type("Bad", (_Fetch,), {"reset": lambda self: 1 / 0})([])
    rule = make(LeastRecentlyUsed(), prefetch=policy)
    rule.reset()
    assert rule._prefetch.faults == 1


# --- the view ------------------------------------------------------------------------------------


def test_the_view_is_read_only_and_live():
    rule = make(LeastRecentlyUsed())
    view = PageView(rule.table)
    for name in ("last_use", "use_count", "loaded_at", "resident"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(view, name)[0] = 5
    rule.run(7, 2, np.array([1]))
    page = int(view.page_of(2, 1))
    assert page == 13
    assert (view.event, view.step, view.layer, view.slots) == (0, 7, 2, SLOTS)
    assert (view.last_use[page], view.use_count[page], view.resident[page]) == (0, 1, True)
    assert view.page_of(1, [0, 5]).tolist() == [6, 11]


def test_the_views_randomness_is_seeded():
    table = make(LeastRecentlyUsed()).table
    draws = [PageView(table, seed=seed).rng.random(4).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
