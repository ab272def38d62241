from __future__ import annotations

import numpy as np
import pytest

from fluxmoe.core.memory.frames import FramePool
from fluxmoe.errors import InvariantError, OutOfFramesError


@pytest.fixture
def pool():
    return FramePool(8, 4096)


def test_take_gives_the_lowest_free_frames(pool):
    assert pool.take("a", 3).tolist() == [0, 1, 2]
    pool.give("a", np.array([1]))
    assert pool.take("b", 3).tolist() == [1, 3, 4]
    assert (pool.owned_by("a"), pool.owned_by("b"), pool.free) == (2, 3, 3)
    pool.check()


def test_the_ledger_is_the_budget(pool):
    assert pool.nbytes == 8 * 4096
    assert pool.free == 8
    assert pool.owned_by("nobody") == 0


def test_taking_more_than_is_free_takes_nothing(pool):
    pool.take("a", 6)
    with pytest.raises(OutOfFramesError, match=r"b asked for 3 frames of 4KiB, but only 2 of 8"):
        pool.take("b", 3)
    assert (pool.free, pool.owned_by("b")) == (2, 0)
    assert pool.take("b", 2).tolist() == [6, 7]
    assert pool.take("b", 0).tolist() == []


def test_a_negative_number_of_frames_is_refused(pool):
    with pytest.raises(InvariantError, match="-1 frames"):
        pool.take("a", -1)
    assert pool.free == 8


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([0, 3], "does not own"),  # b owns 3
        ([0, 5], "does not own"),  # 5 is free
        ([0, 0], "twice"),
        ([0, -8], "outside 0…7"),  # numpy would read -8 as 0
        ([0, 8], "outside 0…7"),
    ],
)
def test_only_own_frames_can_be_given_back_and_nothing_changes_otherwise(pool, frames, why):
    pool.take("a", 3)
    pool.take("b", 2)
    with pytest.raises(InvariantError, match=why):
        pool.give("a", np.array(frames))
    assert (pool.owned_by("a"), pool.owned_by("b")) == (3, 2)
    pool.check()


def test_a_frame_cannot_be_given_back_twice(pool):
    frames = pool.take("a", 2)
    pool.give("a", frames)
    with pytest.raises(InvariantError):
        pool.give("a", frames)
    assert pool.free == 8


def test_a_stranger_cannot_give(pool):
    with pytest.raises(InvariantError, match="stranger"):
        pool.give("stranger", np.array([0]))


def test_giving_nothing_is_allowed_to_everyone(pool):
    pool.give("stranger", np.zeros(0, np.int64))
    assert pool.free == 8


def test_a_budget_below_the_number_of_frames(pool):
    pool.set_limit(5)
    assert (pool.nbytes, pool.free) == (5 * 4096, 5)
    pool.take("a", 4)
    with pytest.raises(OutOfFramesError, match=r"2 frames of 4KiB, but only 1 of 5 are free"):
        pool.take("b", 2)
    pool.set_limit(8)
    assert pool.take("b", 4).tolist() == [4, 5, 6, 7]
    pool.check()


@pytest.mark.parametrize("frames", [-1, 2, 9])
def test_a_budget_that_cannot_be_changes_nothing(pool, frames):
    pool.take("a", 3)
    with pytest.raises(OutOfFramesError, match=r"within 3 \(owned now\) … 8 \(total\)"):
        pool.set_limit(frames)
    assert pool.free == 5
    pool.set_limit(3)
    assert pool.free == 0
    pool.check()
