"""E8: policies cannot reach the host's own memory, however they write to their inputs.

numpy's read-only flag prevents ``array[0] = 1``. It does not prevent writes through
``torch.from_numpy(array)`` or, for an array with a writable owner, ``setflags(write=True)``.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

import fluxmoe
from fluxmoe.core.arbitration.demand import DemandView
from fluxmoe.core.arbitration.messages import StepReport
from fluxmoe.core.arbitration.prefixes import PrefixCurve
from fluxmoe.core.paging.books import CHANGES
from fluxmoe.core.paging.replay import replay
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.arbitration import ArbitrationView, ExpertDemand, PrefixDemand, Split
from fluxmoe.core.policy.guards import ArbitrationGuard, EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import PageView
from fluxmoe.core.types import EventList, Geometry
from fluxmoe.policies.prefetch.none import NoPrefetch
from tests.core.rig import PAGE_CLASS, Rig, StableKernel, rule_for

LAYERS, E = 3, 6
ARRAYS = ("last_use", "use_count", "loaded_at", "resident")


def arrays_of(shown):
    """Yield every array reachable from an argument of a hook through public names."""
    if isinstance(shown, np.ndarray):
        yield shown
    elif isinstance(shown, PageView):
        yield from (getattr(shown, name) for name in ARRAYS)
        with contextlib.suppress(AttributeError):
            yield shown.next_use
    elif is_dataclass(shown):
        for field in fields(shown):
            yield from arrays_of(getattr(shown, field.name))


def spoil(*shown):
    """Write to everything, in each way that bypasses the read-only flag."""
    for argument in shown:
        for array in arrays_of(argument):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that the array is read-only
                torch.from_numpy(array).fill_(1)
            with contextlib.suppress(ValueError):
                array.setflags(write=True)
                array[...] = 10**6 if array.dtype == np.int64 else 1


class ByNumber(fluxmoe.EvictionPolicy):
    """A policy that decides only by page numbers, so that damaged inputs explain no difference."""

    vandal = True

    def spoil(self, *shown):
        if self.vandal:
            spoil(*shown)

    def score(self, view, pages):
        scores = pages * 5 % 7
        self.spoil(view, pages)
        return scores


class Stable(ByNumber):
    stable_score = True


class Selects(ByNumber):
    def select(self, view, pages, n):
        chosen = pages[-n:].copy()
        self.spoil(view, pages)
        return chosen


class Hooks(ByNumber):
    def on_access(self, view, access):
        self.spoil(view, access)

    on_load = on_evict = on_access


class Retains(ByNumber):
    def retain(self, view, access):
        keep = access.pages % 3 > 0
        self.spoil(view, access)
        return keep


class HookedKernel(StableKernel):
    vandal = True
    spoil = ByNumber.spoil
    on_access, on_load, on_evict = Hooks.on_access, Hooks.on_load, Hooks.on_evict


class Fetches(fluxmoe.PrefetchPolicy):
    vandal = True
    spoil = ByNumber.spoil

    def propose(self, view, access):
        following = view.page_of((access.layer + 1) % view.num_layers, [4, 0, 3])
        self.spoil(view, access)
        return following


EVICTION = [ByNumber, Stable, Selects, Hooks, Retains, HookedKernel]


def events(count=40):
    rng = np.random.default_rng(5)
    return [(i % LAYERS, rng.integers(0, E, 4).tolist()) for i in range(count)]


@pytest.mark.parametrize("prefetch", [False, True], ids=["", "prefetch"])
@pytest.mark.parametrize("policy", EVICTION)
def test_e8_writing_to_whatever_a_hook_is_shown_changes_no_page(policy, prefetch):
    rigs, seen = [], []
    for vandal in (False, True):
        evictor, fetcher = policy(), Fetches() if prefetch else None
        for each in filter(None, (evictor, fetcher)):
            each.vandal = vandal
        r = Rig(LAYERS, E, (8,), eviction=evictor, prefetch=fetcher)
        rigs.append(r)
        seen.append([])
        for layer, ids in events():
            r.acquire(layer, ids)  # compares the bytes in the slots
            r.check()
            seen[-1].append((sorted(r.resident), r.pager.counters()))
        books = r.table.books._asdict()
        del books["changed"]
        books["now"][CHANGES] = 0  # only the vandal has read the list of changes
        seen[-1] += [(name, array.tolist()) for name, array in books.items()]
    assert rigs[1].eviction.faults == rigs[1].prefetch.faults == 0
    assert seen[0] == seen[1]
    for r in rigs:
        r.close()


def test_e8_the_fallback_does_not_read_what_the_policy_wrote():
    def outcome(score):
        rule = rule_for(
            PageTable(Geometry(LAYERS, E), [8]), type("P", (ByNumber,), {"score": score})()
        )
        for layer, ids in events():
            rule.run(0, layer, np.array(ids))
        assert rule.eviction.faults > 0
        return np.flatnonzero(rule.table.resident).tolist()

    def spoils(self, view, pages):
        spoil(view)

    assert outcome(spoils) == outcome(lambda self, view, pages: None)


def test_e8_an_oracle_cannot_write_the_future():
    class Oracle(ByNumber):
        needs_future = True

        def score(self, view, pages):
            scores = -np.minimum(view.next_use[pages], 10**6)
            spoil(view)
            return scores

    ids = np.arange(12, dtype=np.int32) % E
    listed = EventList(
        *(np.arange(6, dtype=np.int32), (np.arange(6) % 2).astype(np.int16)),
        *(np.zeros(6, np.int8), np.arange(0, 13, 2), ids, np.arange(12) + 2),
    )
    table, future = PageTable(Geometry(2, E), [E]), np.zeros(2 * E, np.int64)
    view = PageView(table, next_use=future)
    rule = EventRule(
        table, EvictionGuard(Oracle(), view, name="p"), PrefetchGuard(NoPrefetch(), view, name="n")
    )
    replay(rule, listed, 0, 6, np.zeros(6, np.int32))
    assert sorted(future.tolist()) == sorted([*range(2, 14)][-12:])


def test_e8_arbitration_is_shown_copies_of_the_curves():
    class Writes(fluxmoe.ArbitrationPolicy):
        def split(self, view):
            spoil(view.experts, view.prefixes)
            return Split(view.frames)

    costs = DemandView(PAGE_CLASS, 12, 4096)
    costs.update([StepReport(0, None, 1, 1, 1, 0.0, 0.0, (1.0, 0.5, 0.0))])
    prefixes = PrefixCurve(8)
    prefixes.admitted("a", [bytes(8)])
    prefixes.freed("a", [bytes(8)])
    prefixes.admitted("b", [bytes(8)])
    curve = prefixes.curve().tolist()
    guard = ArbitrationGuard(Writes(), name="p")
    guard.split(
        ArbitrationView(
            {"experts": 1, "kv": 1},
            2,
            experts=costs.latest(),
            prefixes=PrefixDemand(curve=prefixes.curve()),
        )
    )
    assert guard.faults == 0
    assert costs.latest().curve.tolist() == [1.0, 0.5, 0.0]
    assert prefixes.curve().tolist() == curve
    given = np.array([1.0, 0.0])
    assert not np.shares_memory(ExpertDemand(curve=given).curve, given)


# --- a policy's own copies of the arrays are kept up to date --------------------------------------


@pytest.mark.parametrize("every", [1, 3, 50])
def test_e8_what_is_shown_is_what_the_books_say(every):
    """Read after few changes, after many changes, and after more changes than are listed."""
    table = PageTable(Geometry(LAYERS, E), [8])
    rule, view = rule_for(table, ByNumber(), Fetches()), PageView(table)
    rule.eviction._policy.vandal = rule._prefetch._policy.vandal = False
    listed = []
    for at, (layer, ids) in enumerate(events(200)):
        rule.run(0, layer, np.array(ids))
        if at % every == 0:
            listed.append(int(table.books.now[CHANGES]))
            for name in ARRAYS[:3]:
                np.testing.assert_array_equal(getattr(view, name), getattr(table.books, name))
    assert (max(listed[1:]) < 0) == (every == 50)  # after many changes, all pages are copied
    assert (min(listed[1:]) > 0) == (every == 1)
    rule.reset()
    assert view.last_use.max() == view.loaded_at.max() == -1 and not view.use_count.any()
