from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmoe.core.memory.arena import Arena
from fluxmoe.core.memory.host import CpuSubstrate, frame_bytes_for
from fluxmoe.errors import InvariantError, SubstrateError
from fluxmoe.sizes import exact
from tests.core.rig import FRAME, Leaks, frames_of_memory, host_only

GROUNDS = ("host", "cuda, at once", "cuda, kernels")


@pytest.fixture
def substrate():
    leaks, substrate = Leaks(), frames_of_memory(16)
    yield substrate
    substrate.close()
    leaks.assert_none()


def memory(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def frames(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


# --- frame size ----------------------------------------------------------------------------------


@host_only
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, 4096),
        (32 << 20, 4096),
        ((32 << 20) + 1, 8192),
        (1 << 30, 128 << 10),
        (3 << 30, 512 << 10),
        (16 << 30, 2 << 20),
        (500 << 30, 2 << 20),
    ],
)
def test_frame_size_of_a_budget(budget, expected):
    assert frame_bytes_for(budget) == expected


@host_only
@given(st.integers(1, 1 << 45))
def test_frame_size_is_the_least_power_of_two_that_makes_at_most_8192_frames(budget):
    size = frame_bytes_for(budget)
    assert size & (size - 1) == 0
    assert 4096 <= size <= 2 << 20
    assert size == 2 << 20 or size * 8192 >= budget
    assert size == 4096 or size // 2 * 8192 < budget


# --- commit and decommit -------------------------------------------------------------------------


def test_scattered_frames_lie_where_they_were_committed(substrate):
    address = substrate.reserve(6 * FRAME)
    substrate.commit(address + FRAME, frames(5, 1, 2, 7))
    rows = memory(address, 6 * FRAME).reshape(6, FRAME)
    for position, value in enumerate([50, 10, 20, 70], start=1):
        rows[position] = value
    substrate.decommit(address, 6)
    other = substrate.reserve(8 * FRAME)
    substrate.commit(other, frames(0, 1, 2, 3, 4, 5, 6, 7))
    found = memory(other, 8 * FRAME).reshape(8, FRAME)
    assert found[:, 0].tolist() == found[:, -1].tolist() == [0, 10, 20, 0, 0, 50, 0, 70]


def test_committing_nothing_does_nothing(substrate):
    address = substrate.reserve(FRAME)
    substrate.commit(address, frames())
    substrate.decommit(address, 0)
    assert memory(address, FRAME)[0] == 0xFF


def test_committed_memory_is_there_at_once(substrate):
    before = substrate.allocated()
    substrate.commit(substrate.reserve(4 * FRAME), frames(0, 1, 9, 4))
    assert substrate.allocated() - before == 4 * FRAME


@host_only
def test_a_commit_that_fails_half_way_maps_nothing():
    class Exhausted(CpuSubstrate):
        """A substrate that refuses to map frame 9, like a system that has run out of mappings."""

        def _map(self, address, nbytes, prot, flags, fd, offset):
            if fd == self._fd and offset == 9 * FRAME:
                raise SubstrateError("cannot map 4.0 KiB: Cannot allocate memory")
            return super()._map(address, nbytes, prot, flags, fd, offset)

    substrate = Exhausted(16, FRAME)
    address = substrate.reserve(5 * FRAME)
    with pytest.raises(SubstrateError, match="Cannot allocate"):
        substrate.commit(address, frames(1, 2, 9, 4, 5))
    assert np.all(memory(address, 5 * FRAME) == 0xFF)
    substrate.close()


# --- uncommitted addresses -----------------------------------------------------------------------


def test_uncommitted_memory_reads_as_nan_in_every_format(substrate):
    address = substrate.reserve(9 << 20)  # larger than the poison file
    poison = memory(address, 9 << 20)
    bf16 = (poison.view(np.uint16)[::1024].astype(np.uint32) << 16).view(np.float32)
    assert np.isnan(bf16).all()
    assert np.isnan(poison.view(np.float16)[::1024]).all()
    assert np.isnan(poison.view(np.float32)[::1024]).all()
    assert np.isnan(poison.view(np.float64)[::1024]).all()


def test_decommitted_memory_reads_as_nan_and_its_neighbours_do_not(substrate):
    address = substrate.reserve(4 * FRAME)
    substrate.commit(address, frames(0, 1, 2, 3))
    rows = memory(address, 4 * FRAME).reshape(4, FRAME)
    rows[...] = 1
    substrate.decommit(address + FRAME, 2)
    assert rows[:, 0].tolist() == [1, 0xFF, 0xFF, 1]


def in_a_child(*lines: str) -> int:
    script = "\n".join(
        [
            "import ctypes, numpy as np",
            "from fluxmoe.core.memory.host import CpuSubstrate",
            *lines,
        ]
    )
    return subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode


@host_only
def test_debug_mode_kills_a_read_of_uncommitted_memory():
    lines = [
        "s = CpuSubstrate(2, 4096, debug=True)",
        "a = s.reserve(8192)",
        "s.commit(a, np.array([1, 0]))",
        "assert ctypes.c_uint8.from_address(a).value == 0",
        "s.decommit(a, 1)",
        "assert ctypes.c_uint8.from_address(a + 4096).value == 0",
        "ctypes.c_uint8.from_address(a).value",
    ]
    assert in_a_child(*lines[:-1]) == 0
    assert in_a_child(*lines) == -signal.SIGSEGV


@host_only
def test_a_write_to_uncommitted_memory_is_killed():
    lines = ["s = CpuSubstrate(2, 4096)", "a = s.reserve(8192)"]
    assert in_a_child(*lines, "assert ctypes.c_uint8.from_address(a).value == 255") == 0
    write = "ctypes.c_uint8.from_address(a).value = 1"
    assert in_a_child(*lines, write) == -signal.SIGSEGV


# --- release and close ---------------------------------------------------------------------------


def test_release_returns_the_memory_to_the_system(substrate):
    address = substrate.reserve(8 * FRAME)
    before = substrate.allocated()
    substrate.commit(address, frames(3, 4, 5, 9, 10, 0, 1, 2))
    memory(address, 8 * FRAME)[...] = 9
    substrate.decommit(address, 8)
    assert substrate.allocated() - before == 8 * FRAME  # decommitting alone frees nothing
    substrate.release(frames(9, 3, 5, 4))
    assert substrate.allocated() - before == 4 * FRAME
    substrate.commit(address, frames(9, 10))
    assert memory(address, 2 * FRAME)[::FRAME].tolist() == [0, 9]


def test_close_is_idempotent_and_unmaps_what_was_left():
    leaks, substrate = Leaks(), frames_of_memory(4)
    substrate.commit(substrate.reserve(4 * FRAME), frames(0, 2))
    substrate.close()
    substrate.close()
    leaks.assert_none()


def test_unreserve_refuses_what_was_not_reserved(substrate):
    address = substrate.reserve(2 * FRAME)
    with pytest.raises(SubstrateError, match="no range"):
        substrate.unreserve(address + FRAME, FRAME)


@host_only
@pytest.mark.parametrize("size", [0, -4096, 1000, 4097])
def test_a_frame_is_whole_pages_of_the_system(size):
    with pytest.raises(SubstrateError, match=f"frame of {exact(size)} is") as info:
        CpuSubstrate(4, size)
    assert info.value.where == "frame_bytes"


@host_only
def test_a_budget_beyond_the_system_is_an_error_and_leaks_nothing():
    leaks = Leaks()
    with pytest.raises(SubstrateError, match="cannot create"):
        CpuSubstrate(1 << 50, 2 << 20)
    leaks.assert_none()


# --- arena ---------------------------------------------------------------------------------------


def test_an_arena_rounds_up_to_whole_frames(substrate):
    arena = Arena(substrate, 2 * FRAME + 1)
    assert len(arena.frame_at) == 3
    arena.commit(0, frames(4, 2, 8))
    assert arena.committed == 3
    assert arena.rows(3, FRAME).shape == (3, FRAME)
    with pytest.raises(InvariantError, match="do not fit"):
        arena.rows(4, FRAME)
    assert sorted(arena.close().tolist()) == [2, 4, 8]


def test_an_arena_keeps_its_address_and_its_neighbours_through_commit_and_decommit(substrate):
    arena = Arena(substrate, 4 * FRAME)
    rows, address = arena.rows(4, FRAME), arena.address
    arena.commit(1, frames(6, 7))
    rows[1:3] = 42
    arena.commit(3, frames(0))
    assert arena.decommit(2, 2).tolist() == [7, 0]
    assert rows[:, 5].tolist() == [0xFF, 42, 0xFF, 0xFF]
    arena.commit(2, frames(7))
    assert (rows[2, 5], arena.address, arena.committed) == (42, address, 2)
    arena.check()
    arena.close()


@pytest.mark.parametrize(("first", "count"), [(0, 2), (1, 1), (3, 2), (4, 1)])
def test_an_arena_commits_only_where_nothing_lies(substrate, first, count):
    arena = Arena(substrate, 4 * FRAME)
    arena.commit(1, frames(9))
    with pytest.raises(InvariantError, match=r"not all positions .* are free"):
        arena.commit(first, frames(*range(count)))
    assert arena.frame_at.tolist() == [-1, 9, -1, -1]
    arena.close()


@pytest.mark.parametrize(("first", "count"), [(0, 2), (2, 1), (1, 4)])
def test_an_arena_decommits_only_what_lies_there(substrate, first, count):
    arena = Arena(substrate, 4 * FRAME)
    arena.commit(1, frames(9))
    with pytest.raises(InvariantError, match=r"not all positions .* are committed"):
        arena.decommit(first, count)
    assert arena.frame_at.tolist() == [-1, 9, -1, -1]
    arena.close()


def test_an_arena_notices_a_frame_that_is_mapped_twice(substrate):
    arena = Arena(substrate, 4 * FRAME)
    arena.commit(0, frames(9))
    arena.commit(2, frames(9))
    with pytest.raises(InvariantError, match="two positions"):
        arena.check()
    arena.close()


@host_only
def test_views_outlive_an_arena_without_its_memory():
    leaks, substrate = Leaks(), frames_of_memory(4)
    before, arena = substrate.allocated(), Arena(substrate, 4 * FRAME)
    arena.commit(0, frames(0, 1, 2))
    view = arena.rows(4, FRAME)[1:3]
    view[:] = 7
    substrate.release(arena.close())
    assert substrate.allocated() == before
    substrate.close()
    assert not view.any()
    view[:] = 1  # does not change the frames, which may now belong to another arena
    del view
    leaks.assert_none()
    assert f"{arena.address:x}-" not in Path("/proc/self/maps").read_text()
