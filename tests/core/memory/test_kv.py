"""The KV tenant: groups of blocks that fill whole frames, committed and released in any order."""

from __future__ import annotations

from math import lcm

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmoe.core.memory.host import frame_bytes_for
from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.core.memory.worker import WorkerMemory
from fluxmoe.errors import InvariantError, OutOfFramesError, SubstrateError
from fluxmoe.testing.faults import FaultySubstrate
from tests.core.rig import FRAME, PAGE_CLASS, Leaks, fails_late, frames_of_memory

GROUNDS = ("host", "cuda, at once")

layouts = st.builds(
    KVLayout,
    st.integers(1, 60),
    st.integers(1, 40).map(lambda n: n * 1024),
    st.sampled_from([4096, 8192, 16384]),
)


@given(layouts)
def test_a_group_is_the_fewest_blocks_that_fill_whole_frames(layout):
    size = layout.blocks_per_group * layout.block_bytes
    assert size == layout.frames_per_group * layout.frame_bytes
    assert size == lcm(layout.block_bytes, layout.frame_bytes)
    blocks = [block for group in range(layout.groups) for block in layout.blocks_of(group)]
    assert blocks == list(range(layout.blocks))
    for group in range(layout.groups - 1):
        assert layout.frames_of(group) == layout.frames_per_group
    assert layout.frames(range(layout.groups)) == -(-layout.nbytes // layout.frame_bytes)


@given(layouts, st.integers(0, 300))
def test_groups_within_is_the_most_that_fit(layout, frames):
    groups = layout.groups_within(frames)
    assert layout.frames(range(groups)) <= frames
    if groups < layout.groups:
        assert layout.frames(range(groups + 1)) > frames


@pytest.mark.parametrize(
    ("budget", "unit", "frame"),
    [
        (64 << 20, 0, 8192),
        (64 << 20, 32 << 10, 8192),  # fits without a change
        (64 << 20, 12 << 10, 4096),
        (2560 << 20, 192 << 10, 128 << 10),  # smaller frames would exceed the number of mappings
        (24 << 30, 12 << 20, 2 << 20),
    ],
)
def test_frames_suit_the_blocks_where_they_can(budget, unit, frame):
    assert frame_bytes_for(budget, unit) == frame


class Setup:
    def __init__(self, frames=12, blocks=7, block=FRAME * 3 // 2) -> None:
        self.substrate = FaultySubstrate(frames_of_memory(frames))
        self.memory = WorkerMemory(self.substrate, PAGE_CLASS, [1])
        self.kv = self.memory.place_kv(KVLayout(blocks, block, FRAME), [0])

    @property
    def rows(self):
        return self.kv.buffer().reshape(self.kv.layout.blocks, -1)

    def check(self):
        self.memory.check()
        committed = self.memory.committed_bytes
        assert self.substrate.allocated() == committed == self.kv.nbytes


@pytest.fixture
def setup():
    leaks, made = Leaks(), []

    def make(**options) -> Setup:
        made.append(Setup(**options))
        return made[-1]

    yield make
    for each in made:
        each.memory.close()
    leaks.assert_none()


def test_fresh_groups_are_zero_others_are_nan(setup):
    s = setup()
    assert np.all(s.rows[:2] == 0)
    assert np.all(s.rows[2:] == 0xFF)
    s.rows[:2] = 7
    s.kv.commit([2, 3])
    assert np.all(s.rows[4:] == 0)
    s.rows[4:] = 9
    s.kv.free([2])
    s.kv.commit([1])  # in frames that held other blocks
    assert np.all(s.rows[2:4] == 0)
    assert np.all(s.rows[:2] == 7)
    assert np.all(s.rows[6] == 9)
    s.check()


def test_both_are_idempotent(setup):
    s = setup()
    s.kv.commit([0, 1, 1])
    assert s.kv.frames == 6
    s.kv.free([1, 1, 2])
    assert s.kv.frames == 3
    s.check()


@pytest.mark.parametrize("nth", [1, 2])
def test_a_commit_that_fails_is_undone(setup, nth):
    s = setup()
    s.substrate.plan.arm("commit", SubstrateError("injected fault"), nth)
    with pytest.raises(SubstrateError, match="injected"):
        s.kv.commit([0, 1, 2])
    assert s.kv.committed.tolist() == [True, False, False, False]
    s.check()
    s.kv.commit([0, 1, 2])
    s.check()


def test_a_commit_that_fails_late_gives_its_memory_back(setup, monkeypatch):
    """The first frames are mapped before the system refuses the next one."""
    s = setup()
    before = s.substrate.allocated()
    monkeypatch.setattr(s.substrate, "commit", fails_late(s.substrate.commit, s.substrate.decommit))
    with pytest.raises(SubstrateError, match="injected"):
        s.kv.commit([1])
    assert s.substrate.allocated() == before
    s.check()


@pytest.mark.parametrize("site", ["decommit", "release"])
def test_a_group_that_the_system_will_not_take_back_does_not_keep_the_others(setup, site):
    s = setup()
    s.kv.commit([0, 1, 2])
    s.substrate.plan.arm(site, SubstrateError("injected fault"), nth=2)
    with pytest.raises(SubstrateError, match="injected"):
        s.kv.free([0, 1, 2])
    s.memory.check()
    assert s.kv.committed.sum() == (site == "decommit")
    s.kv.free([0, 1, 2])
    s.memory.check()
    assert s.kv.frames == 0


def test_frames_that_run_out_in_the_middle_are_given_back(setup):
    s = setup(frames=8)
    with pytest.raises(OutOfFramesError, match="kv asked for 3"):
        s.kv.commit([1, 2])
    assert s.kv.frames == 3
    s.check()


def test_a_group_that_does_not_exist_is_refused(setup):
    s = setup()
    for groups in ([4], [0, -1]):
        for change in (s.kv.commit, s.kv.free):
            with pytest.raises(InvariantError, match="within 0…3"):
                change(groups)
    s.check()


def test_check_notices_what_is_mapped_and_not_in_the_books(setup):
    s = setup()
    s.kv.committed[1] = True
    with pytest.raises(InvariantError, match="differ from the committed"):
        s.kv.check()
    s.kv.committed[1] = False


def test_there_is_one_kv_cache(setup):
    s = setup()
    with pytest.raises(InvariantError, match="already placed"):
        s.memory.place_kv(s.kv.layout, [])


def test_no_room_for_the_first_groups_reserves_nothing():
    leaks = Leaks()
    memory = WorkerMemory(frames_of_memory(2), PAGE_CLASS, [1])
    with pytest.raises(OutOfFramesError):
        memory.place_kv(KVLayout(4, FRAME, FRAME), range(3))
    assert memory.kv is None
    memory.close()
    leaks.assert_none()
