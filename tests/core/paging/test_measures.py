"""The miss-ratio curve compared with exact simulation, and the hull with brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmoe.core.paging.measures import MissRatioCurve, convex_hull
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from tests.core.rig import Rig

LAYERS, EXPERTS = 3, 8
PAGES = LAYERS * EXPERTS


def events(count: int, seed: int = 0, spread: float = 0.35):
    """Generate events layer by layer, with popular experts, padding and repeats."""
    rng = np.random.default_rng(seed)
    for event in range(count):
        ids = np.minimum(rng.geometric(spread, 5) - 1, EXPERTS - 1).astype(np.int32)
        ids[rng.random(5) < 0.1] = -1
        yield event % LAYERS, ids


def observed(trace, **options) -> MissRatioCurve:
    """Compute the curve of a trace, with the bookkeeping in plain Python."""
    curve, last_use = MissRatioCurve(PAGES, EXPERTS, **options), np.full(PAGES, -1, np.int64)
    for event, (layer, ids) in enumerate(trace):
        curve.observe(last_use, layer, ids)
        last_use[layer * EXPERTS + ids[ids >= 0]] = event
    return curve


@pytest.mark.parametrize("slots", [8, 11, 16, 23, 24])
def test_with_every_event_sampled_it_is_what_lru_misses(slots):
    trace = list(events(400))
    rig = Rig(LAYERS, EXPERTS, (slots,), eviction=LeastRecentlyUsed())
    for layer, ids in trace:
        rig.pager.acquire(layer, ids, np.zeros(len(ids), np.int32))
    counts = rig.pager.counters()
    curve = observed(trace, every=1, window=0)
    misses = (curve.curve()[slots] + curve.first_uses) * counts.accesses
    assert round(misses, 6) == counts.misses
    rig.close()


def test_a_sample_of_the_events_comes_close():
    trace = list(events(60_000))
    exact = observed(trace, every=1, window=0).curve()
    sampled = observed(trace, every=20, window=0).curve()
    assert np.abs(exact - sampled).max() < 0.02


def test_it_forgets():
    before, after = list(events(6000, 1, 0.9)), list(events(6000, 2, 0.2))
    curve = observed([*before, *after], every=2).curve()
    assert np.abs(curve - observed(after, every=1, window=0).curve()).max() < 0.1


def test_large_weights_are_scaled_down():
    curve = observed(list(events(4000)), every=1, window=8)
    assert np.isfinite(curve.curve()).all()
    assert 0 < curve.curve()[1] <= 1


def test_a_scan_is_a_cliff_and_its_hull_a_line():
    scan = [(event % LAYERS, np.arange(EXPERTS)) for event in range(30)]
    curve = observed(scan, every=1, window=0)
    warm = 1 - LAYERS / 30
    # Between two uses of a page lie the other layers' pages and the page's successors in its layer.
    assert curve.curve()[:16].tolist() == pytest.approx([warm] * 16)
    assert curve.curve()[PAGES] == 0
    hull = convex_hull(curve.curve())
    assert hull[12] == pytest.approx(warm / 2)


def test_nothing_sampled_nothing_missed():
    curve = MissRatioCurve(PAGES, EXPERTS)
    assert not curve.curve().any()
    assert curve.first_uses == 0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_the_hull_is_the_highest_convex_curve_below(values):
    curve = np.sort(np.asarray(values))[::-1]
    hull = convex_hull(curve)
    assert np.all(hull <= curve + 1e-9)
    for k in range(len(curve)):
        chords = [
            curve[i] + (curve[j] - curve[i]) * (k - i) / (j - i) if j > i else curve[k]
            for i in range(k + 1)
            for j in range(k, len(curve))
        ]
        assert hull[k] == pytest.approx(min(chords), abs=1e-9)
