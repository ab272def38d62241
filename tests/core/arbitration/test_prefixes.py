"""The prefix curve compared with simulated LRU prefix caches of every size."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmoe.core.arbitration.prefixes import POINTS, PrefixCurve
from fluxmoe.core.policy.arbitration import PrefixDemand

BLOCKS = 64


def hashes(talk: int, count: int) -> list[bytes]:
    """Make the hashes of the first blocks of a conversation."""
    return [hashlib.sha256(f"{talk}:{block}".encode()).digest() for block in range(count)]


def lru(requests: list[tuple[int, int]], blocks: int) -> int:
    """Count the hits of an LRU cache with ``blocks`` blocks for sequential requests."""
    cache: list[bytes] = []
    found = 0
    for talk, count in requests:
        names = hashes(talk, count)
        found += sum(name in cache for name in names)
        cache = [name for name in cache if name not in names] + names[::-1]
        cache = cache[max(0, len(cache) - blocks) :]
    return found


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 8)), min_size=1, max_size=60))
def test_it_is_what_caches_of_every_size_find(requests):
    curve = PrefixCurve(BLOCKS, window=10**9)
    for talk, count in requests:
        curve.admitted("one", hashes(talk, count))
        curve.freed("one", hashes(talk, count))
    asked = sum(count for _, count in requests)
    for point, share in enumerate(curve.curve()):
        assert share == pytest.approx(lru(requests, point * BLOCKS // (POINTS - 1)) / asked)


def test_a_sample_of_the_blocks_sees_the_cliff():
    # 100 alternating conversations of 10 blocks: a cache of fewer than 1000 blocks has no hits; in
    # a larger cache, all blocks hit.
    curve = PrefixCurve(4000, sampled=400)
    for _ in range(8):
        for talk in range(100):
            curve.admitted("one", hashes(talk, 10))
            curve.freed("one", hashes(talk, 10))
    demand = PrefixDemand(0, 0, 4000.0, curve.curve())
    assert demand.hit_ratio(700) == 0
    assert demand.hit_ratio(1300) > 0.95
    assert np.all(np.diff(curve.curve()) >= 0)


def test_blocks_that_a_request_has_filled_are_found_by_the_next():
    curve = PrefixCurve(BLOCKS)
    curve.admitted("first", hashes(0, 2))
    curve.freed("first", hashes(0, 6))
    assert curve.curve()[-1] == 0
    curve.admitted("second", hashes(0, 6))
    assert curve.curve()[-1] == pytest.approx(6 / 8, rel=0.01)


def test_what_was_long_ago_counts_less():
    curve = PrefixCurve(BLOCKS, window=16)
    for talk in range(100):
        curve.admitted(str(talk), hashes(talk, 4))
    for again in range(100):
        curve.admitted(f"again {again}", hashes(0, 4))
    assert curve.curve()[-1] > 0.95


def test_nothing_is_known_before_anything_was_asked():
    curve = PrefixCurve(BLOCKS)
    curve.admitted("one", [])
    assert curve.curve().size == 0
    assert PrefixDemand(curve=curve.curve()).hit_ratio([1.0, 2.0]).tolist() == [0.0, 0.0]
    assert PrefixDemand().hit_ratio(3) == 0


def test_blocks_in_use_are_found_without_a_free_one_and_forgotten_when_their_last_user_ends():
    curve = PrefixCurve(BLOCKS, window=10**9)
    curve.admitted("a", hashes(0, 4))
    curve.admitted("b", hashes(0, 4))
    assert curve.curve()[0] == curve.curve()[-1] == pytest.approx(4 / 8)
    curve.freed("a", hashes(0, 4))
    curve.admitted("c", hashes(0, 4))  # b still uses these blocks
    assert curve.curve()[1] == pytest.approx(8 / 12)
    for request in ("b", "c"):
        curve.freed(request, hashes(0, 4))
    curve.admitted("d", hashes(1, 8))
    curve.freed("d", hashes(1, 8))
    curve.admitted("e", hashes(0, 4))  # beneath eight other blocks
    assert curve.curve()[0] == pytest.approx(8 / 24)
    assert curve.curve()[-1] == pytest.approx(12 / 24)


def test_a_request_that_was_preempted_leaves_its_blocks_behind():
    curve = PrefixCurve(BLOCKS, window=10**9)
    curve.admitted("a", hashes(0, 2))
    curve.admitted("a", hashes(0, 8))  # all eight were filled before the preemption
    assert curve.curve()[0] == 0
    assert curve.curve()[4] < curve.curve()[8] == pytest.approx(8 / 10)
    curve.freed("a", hashes(0, 8))
    assert not curve._users
    assert not curve._used


def test_a_request_that_never_ran_has_filled_nothing():
    curve = PrefixCurve(BLOCKS)
    curve.freed("impatient", hashes(0, 4))
    curve.admitted("again", hashes(0, 4))
    assert curve.curve()[-1] == 0


def test_what_running_requests_share_is_saved():
    curve = PrefixCurve(BLOCKS)
    assert curve.saved() == 0
    for name in range(4):
        curve.admitted(str(name), hashes(0, 6) + hashes(name + 1, 2))
    assert curve.saved() == pytest.approx(6 * 3 / 4)
    for name in range(1, 4):
        curve.freed(str(name), hashes(0, 6))
    assert curve.saved() == 0
