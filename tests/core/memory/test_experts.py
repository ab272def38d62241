"""Experts and worker memory: frames and their memory move together, and no frame is lost."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmoe.core.memory.experts import ExpertTenant, frames_for, slots_within
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.core.memory.worker import WorkerMemory
from fluxmoe.core.types import PageClass, Part
from fluxmoe.errors import InvariantError, OutOfFramesError, SubstrateError
from fluxmoe.testing.faults import FaultySubstrate
from tests.core.rig import FRAME, PAGE_CLASS, Leaks, fails_late, frames_of_memory

GROUNDS = ("host", "cuda, at once")

sizes = st.lists(st.integers(1, 20_000), min_size=1, max_size=4)


def page_class(nbytes: list[int]) -> PageClass:
    return PageClass(tuple(Part(f"p{i}", n, n) for i, n in enumerate(nbytes)))


@given(sizes, st.integers(0, 500))
def test_slots_within_is_the_most_that_fits(nbytes, frames):
    layout = page_class(nbytes)
    slots = slots_within(layout, frames, FRAME)
    assert frames_for(layout, slots, FRAME) <= frames
    assert frames_for(layout, slots + 1, FRAME) > frames


def test_each_part_fills_frames_of_its_own():
    assert frames_for(page_class([1, 1, 4097]), 1, FRAME) == 4
    assert frames_for(page_class([2048, 4096]), 2, FRAME) == 3
    assert frames_for(PAGE_CLASS, 0, FRAME) == 0


class Setup:
    def __init__(self, frames: int = 40, reserved=(12,)) -> None:
        self.substrate = FaultySubstrate(frames_of_memory(frames))
        self.memory = WorkerMemory(self.substrate, PAGE_CLASS, reserved)
        self.pool, self.experts = self.memory.pool, self.memory.experts


@pytest.fixture
def setup():
    leaks, made = Leaks(), []

    def make(*args, **options) -> Setup:
        made.append(Setup(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.memory.close()
    leaks.assert_none()


def test_what_is_committed_is_what_is_owned_is_what_the_system_gave(setup):
    s = setup()
    for slots in (6, 12, 7, 0, 1, 12):
        s.experts.resize(0, slots)
        s.experts.check()
        s.memory.check()
        assert s.experts.frames == frames_for(PAGE_CLASS, slots, FRAME)
        assert s.experts.nbytes == s.memory.committed_bytes == s.substrate.allocated()
        assert s.memory.frames() == {"experts": s.experts.frames, "kv": 0}


def test_slots_keep_address_and_contents_through_resize_and_frames_are_cleared_between(setup):
    s = setup(reserved=(12, 4))
    s.experts.resize(0, 12)
    rows = s.experts.rows(0)
    for part in rows:
        part[...] = np.arange(12, dtype=np.uint8)[:, None]
    s.experts.resize(0, 5)
    s.experts.resize(1, 4)  # takes frames that belonged to slots of bank 0
    s.experts.check()
    assert all((part[:5] == np.arange(5)[:, None]).all() for part in rows)
    assert all(not part.any() for part in s.experts.rows(1))
    s.experts.resize(0, 8)
    assert all((part[:5] == np.arange(5)[:, None]).all() for part in rows)
    s.experts.check()


def test_beyond_the_committed_slots_there_are_nans(setup):
    s = setup()
    s.experts.resize(0, 2)
    for part in s.experts.rows(0):
        assert np.all(part[-1] == 0xFF)


@pytest.mark.parametrize("part", [1, 2])
def test_a_commit_that_fails_in_either_part_is_rolled_back(setup, part):
    s = setup()
    s.experts.resize(0, 4)
    before = (s.pool.free, s.experts.slots, s.substrate.allocated())
    s.substrate.plan.arm("commit", SubstrateError("injected fault"), nth=part)
    with pytest.raises(SubstrateError, match="injected"):
        s.experts.resize(0, 12)
    assert (s.pool.free, s.experts.slots, s.substrate.allocated()) == before
    s.experts.check()
    s.memory.check()
    s.experts.resize(0, 12)
    s.experts.check()


def test_a_commit_that_fails_late_gives_its_memory_back(setup, monkeypatch):
    s = setup()
    s.experts.resize(0, 4)
    before = s.substrate.allocated()
    monkeypatch.setattr(s.substrate, "commit", fails_late(s.substrate.commit, s.substrate.decommit))
    with pytest.raises(SubstrateError, match="injected"):
        s.experts.resize(0, 12)
    assert s.substrate.allocated() == before == s.memory.committed_bytes
    s.memory.check()


def test_frames_that_run_out_in_the_second_part_are_rolled_back(setup):
    s = setup(frames=frames_for(PAGE_CLASS, 12, FRAME) - 1)
    s.experts.resize(0, 4)
    free = s.pool.free
    with pytest.raises(OutOfFramesError):
        s.experts.resize(0, 12)
    assert (s.pool.free, s.experts.slots) == (free, [4])
    s.experts.check()


def test_a_refusal_to_undo_what_was_refused_leaves_the_books_right(setup, monkeypatch):
    s = setup()
    s.experts.resize(0, 4)
    free = s.pool.free

    def refuse(address, count):
        raise SubstrateError("this neither")

    s.substrate.plan.arm("commit", SubstrateError("injected fault"), nth=2)
    with monkeypatch.context() as patch, pytest.raises(SubstrateError):
        patch.setattr(s.substrate, "decommit", refuse)
        s.experts.resize(0, 12)
    s.experts.check()
    assert s.experts.slots == [4]
    assert s.pool.free < free  # frames that are still mapped belong to the experts
    s.experts.resize(0, 4)
    s.experts.check()
    assert s.pool.free == free


def test_addresses_that_the_system_refuses_leave_nothing_reserved():
    with closing(frames_of_memory(40)) as real:
        substrate = FaultySubstrate(real)
        substrate.plan.arm("reserve", SubstrateError("injected fault"), nth=4)
        with pytest.raises(SubstrateError, match="injected"):
            ExpertTenant(FramePool(40, FRAME), substrate, PAGE_CLASS, [12, 4])
        assert not real._ranges


@pytest.mark.parametrize("part", [1, 2])
def test_closing_gives_back_all_that_the_system_takes(setup, part):
    s = setup()
    s.experts.resize(0, 12)
    s.substrate.plan.arm("release", SubstrateError("injected fault"), nth=part)
    with pytest.raises(SubstrateError, match="injected"):
        s.experts.close()
    assert s.pool.free == s.pool.count
    s.experts.close()


def test_check_notices_slots_without_memory(setup):
    s = setup()
    s.experts.resize(0, 4)
    s.experts.slots[0] = 8
    with pytest.raises(InvariantError, match="not all 8 slots of w13"):
        s.experts.check()
    s.experts.slots[0] = 4


def test_closing_releases_both_tenants_once(setup):
    s = setup()
    s.experts.resize(0, 4)
    s.memory.place_kv(KVLayout(4, FRAME, FRAME), [0, 2])
    s.memory.close()
    assert s.pool.owned == 0
    s.memory.close()


def test_memory_of_a_stranger_does_not_go_unnoticed_at_the_end():
    memory = WorkerMemory(frames_of_memory(8), PAGE_CLASS, [1])
    memory.pool.take("somebody", 2)
    with pytest.raises(InvariantError, match="tenants still hold frames"):
        memory.close()


def test_check_notices_a_stranger(setup):
    s = setup()
    stolen = s.pool.take("somebody", 2)
    with pytest.raises(InvariantError, match="an unknown tenant owns"):
        s.memory.check()
    s.pool.give("somebody", stolen)
