"""The contract of the substrate and streams, on a GPU if there is one and always on the fake.

``python -m tests.cuda`` runs these tests with only numpy, pytest, torch and the dependencies of
``import fluxmoe``. Memory is read by the driver's copies. A kernel is a copy within the device on
the kernels' stream, since only its order matters.
"""

from __future__ import annotations

import numpy as np
import pytest

from fluxmoe.core.memory.arena import Arena
from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.kv import KVLayout, KVTenant
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.types import Geometry, Loads, PageClass, Part
from fluxmoe.cuda.pinned import PinnedStore
from fluxmoe.cuda.streams import StreamCopier
from fluxmoe.errors import DeviceMemoryError, SubstrateError
from fluxmoe.stores.host import HostStore
from tests.cuda.card import FRAME, fake_card, real_card

#: Neither part's size divides a frame, so slots straddle frames at irregular offsets.
PAGE_CLASS = PageClass((Part("w13", 1_500_016, 1), Part("w2", 700_016, 1)))
GEOMETRY = Geometry(4, 6)
SLOTS = 12


@pytest.fixture(
    params=["at once", "kernels", "copies", pytest.param("gpu", marks=pytest.mark.cuda)]
)
def card(request):
    card = real_card() if request.param == "gpu" else fake_card(request.param)
    if isinstance(card, str):
        pytest.skip(card)
    yield card
    card.finish()
    card.close()
    if card.fake is not None:
        assert not card.fake.live()
        card.fake.close()


def frames(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


# --- substrate ------------------------------------------------------------------------------------


def test_scattered_frames_lie_where_they_were_committed_and_keep_what_they_hold(card):
    with card.substrate(10) as s:
        address = s.reserve(6 * FRAME)
        s.commit(address + FRAME, frames(5, 1, 2, 7))
        for position, value in enumerate([50, 10, 20, 70], start=1):
            card.fill(address + position * FRAME, value)
        s.decommit(address + FRAME, 4)
        other = s.reserve(8 * FRAME)
        s.commit(other, frames(0, 1, 2, 3, 4, 5, 6, 7))
        assert card.firsts(other, 8) == [0, 10, 20, 0, 0, 50, 0, 70]


@pytest.mark.parametrize("recycle", [True, False])
def test_frames_that_were_released_come_back_as_zeros(card, recycle):
    with card.substrate(4, recycle=recycle) as s:
        address = s.reserve(4 * FRAME)
        for _ in range(3):
            s.commit(address, frames(3, 0, 1, 2))
            assert not card.read(address, 4 * FRAME).any()
            card.fill(address, 9, 4)
            s.decommit(address, 4)
            s.release(frames(0, 1, 2, 3))
            assert s.allocated() == (4 * FRAME if recycle else 0)


def test_an_address_without_a_frame_can_not_be_copied_to(card):
    with card.substrate(4) as s:
        address = s.reserve(4 * FRAME)
        s.commit(address, frames(0, 1))
        s.decommit(address + FRAME, 1)
        card.fill(address, 1)
        for place in (address + FRAME, address + 3 * FRAME):
            with pytest.raises(SubstrateError, match="CUDA_ERROR"):
                card.fill(place, 1)
        assert card.firsts(address, 1) == [1]


def test_an_arena_keeps_its_address_and_its_neighbours(card):
    with card.substrate(8) as s:
        arena = Arena(s, 4 * FRAME)
        arena.commit(1, frames(6, 7))
        card.fill(arena.address + FRAME, 42, 2)
        arena.commit(3, frames(0))
        assert arena.decommit(2, 2).tolist() == [7, 0]
        arena.commit(2, frames(7))
        assert card.firsts(arena.address + FRAME, 2) == [42, 42]
        arena.close()


def test_memory_that_runs_out_is_told_apart_and_given_back(card):
    free, _ = card.cuda.memory()
    count = free // FRAME + 8
    with card.substrate(count, recycle=False) as s:
        address = s.reserve(count * FRAME)
        with pytest.raises(DeviceMemoryError, match="is free") as info:
            s.commit(address, np.arange(count))
        assert info.value.where == "cuMemCreate"
        assert s.allocated() == 0
        s.commit(address, np.arange(4))
        assert card.firsts(address, 4) == [0] * 4
    assert abs(card.cuda.memory()[0] - free) < 64 << 20  # the driver may keep its own tables


def test_frames_that_are_given_back_are_free_for_others(card):
    with card.substrate(16, recycle=False) as s:
        address = s.reserve(16 * FRAME)
        before, _ = card.cuda.memory()
        s.commit(address, np.arange(16))
        assert before - card.cuda.memory()[0] >= 16 * FRAME
        s.decommit(address, 16)
        s.release(np.arange(16))
        assert before - card.cuda.memory()[0] < 16 * FRAME


def test_unmapping_waits_for_the_kernels(card):
    with card.arena(8) as scratch, card.substrate(4) as s:
        address = s.reserve(2 * FRAME)
        s.commit(address, frames(0, 1))
        card.fill(address, 33, 2)
        card.keep_busy(scratch.address + 4 * FRAME, 4 * FRAME, 200)
        card.copy_when_its_turn_comes(scratch.address, address, 2 * FRAME)
        s.decommit(address, 2)
        card.finish()
        assert card.firsts(scratch.address, 2) == [33, 33]


def test_slots_keep_address_and_contents_through_resize(card):
    with card.substrate(30) as s:
        tenant = ExpertTenant(FramePool(30, FRAME), s, PAGE_CLASS, [SLOTS])
        tenant.resize(0, SLOTS)
        places = [(arena.address, arena.nbytes) for arena in tenant.export(0)]
        for slot in range(SLOTS):
            for first, nbytes in places:
                card.write(first + slot * nbytes, np.full(nbytes, slot + 1, np.uint8))
        for slots in (5, 9, 6, SLOTS):
            tenant.resize(0, slots)
            tenant.check()
            for slot in range(5):
                for first, nbytes in places:
                    assert np.all(card.read(first + slot * nbytes, nbytes) == slot + 1)
        tenant.close()


def test_fresh_groups_of_kv_are_zero(card):
    with card.substrate(12) as s:
        kv = KVTenant(FramePool(12, FRAME), s, KVLayout(7, FRAME * 3 // 2, FRAME))
        first = kv.export().address
        kv.commit([0, 2])
        card.fill(first, 7, 3)
        card.fill(first + 6 * FRAME, 7, 3)
        kv.free([2])
        kv.commit([1])
        assert card.firsts(first, 6) == [7, 7, 7, 0, 0, 0]
        kv.check()
        kv.close()


def test_an_arena_is_a_tensor_of_torch(card):
    torch = pytest.importorskip("torch")
    if card.fake is not None or not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    with card.arena(3) as arena:
        tensor = torch.from_dlpack(arena.export(3, FRAME))
        assert (tensor.data_ptr(), tensor.shape) == (arena.address, (3, FRAME))
        card.fill(arena.address + FRAME, 5)
        assert tensor.sum(1).tolist() == [0, 5 * FRAME, 0]
        tensor.view(torch.bfloat16)[2].fill_(1.0)
        torch.cuda.synchronize()
        assert card.read(arena.address + 2 * FRAME, 2).tolist() == [0x80, 0x3F]
        del tensor


# --- streams --------------------------------------------------------------------------------------


def contents() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    pages = GEOMETRY.num_pages
    return [rng.integers(0, 256, (pages, part.nbytes), np.uint8) for part in PAGE_CLASS.parts]


@pytest.mark.parametrize("pinned", [True, False])
def test_kernels_read_their_own_pages_however_late_they_come(card, pinned):
    right, experts = contents(), GEOMETRY.experts_per_layer
    store = (
        PinnedStore(card.cuda, GEOMETRY, PAGE_CLASS) if pinned else HostStore(GEOMETRY, PAGE_CLASS)
    )
    for first in range(0, GEOMETRY.num_pages, experts):
        store.adopt([rows[first : first + experts] for rows in right])
    rng = np.random.default_rng(5)
    with card.substrate(20) as s, card.arena(26) as seen:
        tenant = ExpertTenant(FramePool(20, FRAME), s, PAGE_CLASS, [SLOTS])
        tenant.resize(0, SLOTS)
        slots = [(part.address, part.nbytes) for part in tenant.export(0)]
        copier = StreamCopier(
            card.cuda,
            store,
            [tenant.export(0)],
            kernels=lambda: int(card.kernels),
            ahead=3 * PAGE_CLASS.nbytes,
        )
        engine = TransferEngine(copier, PAGE_CLASS.nbytes)
        for _ in range(12):  # each round checks what its kernels read
            expected = []
            for turn in range(6):
                card.keep_busy(seen.address + 20 * FRAME, 6 * FRAME, 5)
                now, ahead = rng.choice(SLOTS, (2, 3), replace=False)
                pages = rng.choice(GEOMETRY.num_pages, 6, replace=False)
                engine.demand(Loads(0, pages[:3], now))
                engine.prefetch(Loads(0, pages[3:], ahead))
                engine.complete(0, int(pages[3]), int(ahead[0]))
                engine.move(0, int(pages[0]), int(now[0]), int(now[1]))
                place = len(expected)
                for slot, page in [(now[1], pages[0]), (now[2], pages[2]), (ahead[0], pages[3])]:
                    part = (turn + place) % 2
                    first, nbytes = slots[part]
                    target = seen.address + len(expected) * FRAME
                    card.copy_when_its_turn_comes(target, first + int(slot) * nbytes, nbytes)
                    expected.append((target, part, int(page)))
            card.finish()
            for target, part, page in expected:
                assert np.array_equal(card.read(target, right[part].shape[1]), right[part][page])
        assert engine.bytes_demand == 12 * 6 * 3 * PAGE_CLASS.nbytes
        engine.close()
        store.close()
        tenant.close()


def test_a_stall_is_measured_by_the_device(card):
    store = PinnedStore(card.cuda, GEOMETRY, PAGE_CLASS)
    right, experts = contents(), GEOMETRY.experts_per_layer
    for first in range(0, GEOMETRY.num_pages, experts):
        store.adopt([rows[first : first + experts] for rows in right])
    with card.substrate(20) as s:
        tenant = ExpertTenant(FramePool(20, FRAME), s, PAGE_CLASS, [SLOTS])
        tenant.resize(0, SLOTS)
        kernels = int(card.kernels)
        copier = StreamCopier(card.cuda, store, [tenant.export(0)], kernels=lambda: kernels)
        engine = TransferEngine(copier, PAGE_CLASS.nbytes)
        for _ in range(2):
            engine.demand(Loads(0, np.arange(SLOTS), np.arange(SLOTS)))
            card.finish()
        assert engine.stall_seconds > 0 or card.cuda.version < 12080
        engine.close()
        store.close()
        tenant.close()
