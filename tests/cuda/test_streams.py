"""Copies on streams: waiting on the device, bytes in flight, and failures.

The fake's streams work late, early or at random, as far as events allow, so missing waits show up
as wrong results.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from fluxmoe.core.memory import dlpack
from fluxmoe.core.memory.dlpack import Exported
from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.types import Geometry, Loads
from fluxmoe.cuda.batches import CopySubmitter
from fluxmoe.cuda.driver import CudaDriver, no_range, nvtx_ranges
from fluxmoe.cuda.fake import FakeDriver, Refused
from fluxmoe.cuda.fake.timeline import KERNELS
from fluxmoe.cuda.pinned import BUFFERS, PinnedStore
from fluxmoe.cuda.streams import MOST_DEMANDS, StreamCopier
from fluxmoe.errors import FluxMoEError, StoreError, SubstrateError
from fluxmoe.policies.prefetch.next_layer import NextLayer
from fluxmoe.testing.faults import FaultPlan, FaultyAddressedStore, FaultyStore
from tests.core.rig import FRAME, PAGE_CLASS, FakeCuda, Leaks, Rig, content, contents, host_store

NO = Refused(FakeDriver.CUresult.CUDA_ERROR_UNKNOWN)
SLOTS = 12
COPIES = ("cuMemcpyBatchAsync", "cuMemcpyHtoDAsync")
paces = pytest.mark.parametrize("pace", ["at once", "kernels", "copies", "random"])
sources = pytest.mark.parametrize("source", ["pinned", "buffers"])


class Gpu:
    """A transfer engine over one bank of a GPU."""

    def __init__(self, source="pinned", *, ahead=2, **options) -> None:
        self.ground = FakeCuda(40, **options)
        self.fake = self.ground.fake
        self.tenant = ExpertTenant(FramePool(40, FRAME), self.ground, PAGE_CLASS, [SLOTS])
        self.tenant.resize(0, SLOTS)
        self.rows = self.tenant.rows(0)
        pinned = source == "pinned"
        store = host_store(Geometry(6, 4), self.ground.cuda if pinned else None)
        self.store = FaultyAddressedStore(store) if pinned else FaultyStore(store)
        self.ranges: list[str] = []
        self.copier = StreamCopier(
            self.ground.cuda,
            self.store,
            [self.tenant.export(0)],
            ahead=ahead * PAGE_CLASS.nbytes,
            ranges=lambda name: (self.ranges.append(name), no_range(name))[1],
        )
        self.engine = TransferEngine(self.copier, PAGE_CLASS.nbytes)

    def demand(self, pages: dict[int, int]) -> None:
        self.engine.demand(loads(pages))

    def prefetch(self, pages: dict[int, int]) -> None:
        self.engine.prefetch(loads(pages))

    def expect(self, slot: int, page: int) -> None:
        """Launch a kernel that reads a slot."""

        def kernel() -> None:
            for part, rows in enumerate(self.rows):
                np.testing.assert_array_equal(rows[slot], content(page, part), f"page {page}")

        self.fake.launch(kernel)

    def passed(self, *names: str) -> int:
        return sum(self.fake.plan.passed[name] for name in names)

    def end(self) -> None:
        self.fake.timeline.finish()
        self.engine.close()
        self.store.close()
        self.tenant.close()
        self.ground.close()


def loads(pages: dict[int, int]) -> Loads:
    return Loads(0, np.array(list(pages.values())), np.array(list(pages)))


@pytest.fixture
def gpu():
    leaks, made = Leaks(), []

    def make(*args, **options) -> Gpu:
        made.append(Gpu(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.end()
    leaks.assert_none()


# --- order of copies and kernels ------------------------------------------------------------------


@paces
@sources
def test_kernels_read_their_own_pages_however_late_they_come(gpu, pace, source):
    """A write to a slot is ordered before kernels that read the slot's previous page have begun."""
    for seed in range(20):
        g, rng = gpu(source, pace=pace, seed=seed), np.random.default_rng(seed)
        holds = {}
        for _ in range(25):
            fresh = {int(s): int(rng.integers(24)) for s in rng.choice(SLOTS, 3, replace=False)}
            kind = rng.integers(4)
            if kind == 0:
                g.demand(fresh)
                holds |= fresh
            elif kind == 1:
                g.prefetch(fresh)  # must not be read before completion
                holds = {slot: page for slot, page in holds.items() if slot not in fresh}
                for slot, page in list(fresh.items())[: rng.integers(4)]:
                    g.engine.complete(0, page, slot)
                    holds[slot] = page
            elif kind == 2 and holds:
                source_slot = int(rng.choice(list(holds)))
                target = int(rng.integers(SLOTS))
                if target != source_slot:
                    g.engine.move(0, holds[source_slot], source_slot, target)
                    holds[target] = holds[source_slot]
            for slot, page in holds.items():
                g.expect(slot, page)
    # `end` runs the kernels that have not run yet.


def test_a_demand_overtakes_the_prefetches_that_wait_for_their_turn(gpu):
    g = gpu(ahead=2, pace="kernels")
    g.prefetch({slot: slot for slot in range(8)})
    assert len(g.copier._prefetches) == 1
    assert len(g.copier._orders) == 6
    g.demand({9: 20})
    g.expect(9, 20)
    g.fake.timeline.finish(KERNELS)
    assert g.rows[0][7, 0] == 0  # the slot is not written yet


def test_prefetches_go_on_when_those_before_have_arrived(gpu):
    g = gpu(ahead=2, pace="kernels")
    g.prefetch({slot: slot for slot in range(8)})
    for slot in range(8):
        g.fake.timeline.finish()
        g.engine.complete(0, slot, slot)
        g.expect(slot, slot)
    assert not g.copier._orders
    assert g.passed(*COPIES) < 8 * 2  # several pages in one call


def test_never_more_is_under_way_than_may_be(gpu):
    g = gpu(ahead=3, pace="kernels")
    for first in range(0, 12, 4):
        g.prefetch({first + i: first + i for i in range(4)})
        under_way = sum(batch.nbytes for batch in g.copier._prefetches)
        assert under_way <= 3 * PAGE_CLASS.nbytes


def test_a_page_larger_than_what_may_be_under_way_goes_alone(gpu):
    g = gpu(ahead=0, pace="kernels")
    g.prefetch({0: 1, 1: 2})
    assert [batch.nbytes for batch in g.copier._prefetches] == [PAGE_CLASS.nbytes]
    for slot in (0, 1):
        g.engine.complete(0, slot + 1, slot)
        g.expect(slot, slot + 1)


def test_too_many_demands_make_the_processor_wait(gpu):
    g = gpu(pace="kernels")
    for turn in range(MOST_DEMANDS + 20):
        g.demand({turn % SLOTS: turn % 24})
        g.expect(turn % SLOTS, turn % 24)
    assert len(g.copier._demands) <= MOST_DEMANDS


def test_more_pages_than_buffers_come_in_turns(gpu):
    g = gpu("buffers", pace="copies")
    wanted = {slot: 2 * slot for slot in range(2 * BUFFERS + 1)}
    g.demand(wanted)
    for slot, page in wanted.items():
        g.expect(slot, page)
    g.prefetch({slot: 23 - slot for slot in range(9)})
    assert len(g.copier._orders) >= 9 - BUFFERS


def test_a_prefetch_that_was_called_off_before_its_turn_is_never_made(gpu):
    g = gpu(ahead=1, pace="random")
    g.prefetch({0: 1, 1: 2, 2: 3})
    g.engine.settle_from(0, 1)
    reads = list(g.store.reads)
    g.prefetch({5: 6})
    g.engine.complete(0, 6, 5)
    g.engine.complete(0, 1, 0)
    assert not {2, 3} & set(g.store.reads[len(reads) :])


# --- minimal numbers of calls ---------------------------------------------------------------------


def test_a_step_whose_pages_are_all_there_makes_no_call():
    ground = FakeCuda(60)
    r = Rig(3, 4, (12,), substrate=ground)
    for layer in range(3):
        r.acquire(layer, [0, 1, 2, 3])
    before = sum(ground.fake.plan.passed.values())
    for layer in range(3):
        r.acquire(layer, [0, 1, 2, 3])
    assert sum(ground.fake.plan.passed.values()) == before
    r.close()


def test_pages_that_adjoin_are_one_copy(gpu):
    g = gpu()
    g.demand({slot: 4 + slot for slot in range(4)})  # a whole layer into the first slots
    assert [g.passed(name) for name in COPIES] == [1, 0]
    g = gpu(version=12040)
    g.demand({slot: 4 + slot for slot in range(4)})
    assert [g.passed(name) for name in COPIES] == [0, 2]  # one for each part
    g.expect(3, 7)


@pytest.mark.parametrize(
    ("driver", "bindings", "batches"),
    [(12040, 12090, False), (12080, 12090, True), (13000, 13050, True), (12090, 13050, False)],
)
def test_whether_copies_are_batched_is_decided_at_the_start(driver, bindings, batches):
    fake = FakeDriver(40, version=driver)
    fake.CUDA_VERSION = bindings
    fake.cuDriverGetVersion = lambda: (fake.CUresult.CUDA_SUCCESS, driver)
    cuda = CudaDriver(fake)
    assert CopySubmitter(cuda).batched is batches
    cuda.close()
    fake.close()


def test_events_are_used_again(gpu):
    g = gpu(pace="at once")
    for turn in range(50):
        g.demand({turn % SLOTS: turn % 24})
        g.prefetch({(turn + 5) % SLOTS: turn % 24})
        g.engine.complete(0, turn % 24, (turn + 5) % SLOTS)
    assert g.passed("cuEventCreate") <= 6


def test_the_profiler_sees_what_is_going_on(gpu):
    g = gpu()
    g.demand({0: 1, 1: 5})
    g.prefetch({2: 3})
    g.engine.complete(0, 3, 2)
    assert g.ranges == ["fluxmoe: demand 2 pages", "fluxmoe: prefetch 1 pages", "fluxmoe: arrive"]
    assert nvtx_ranges() is no_range or callable(nvtx_ranges())


# --- stalls ---------------------------------------------------------------------------------------


def test_a_stall_is_the_time_that_the_kernels_waited(gpu):
    g = gpu(pace="kernels")
    g.demand({0: 1})
    g.fake.timeline.finish()
    g.demand({1: 2})
    assert g.engine.stall_seconds > 0
    g.engine.reset()
    assert g.engine.stall_seconds == 0
    g.fake.timeline.finish()


def test_a_prefetch_that_came_in_time_is_no_stall(gpu):
    g = gpu(pace="copies")
    g.prefetch({0: 1})
    g.fake.timeline.finish()
    g.engine.complete(0, 1, 0)
    g.fake.timeline.finish()
    g.prefetch({2: 3})
    assert g.engine.stall_seconds == 0


# --- failures -------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_read_ahead_does_not_keep_its_neighbours(gpu):
    g = gpu(ahead=9)
    g.store.broken = {2}
    g.prefetch({0: 1, 1: 2, 2: 3})
    for slot, page in [(0, 1), (2, 3)]:
        g.engine.complete(0, page, slot)
        g.expect(slot, page)
    with pytest.raises(StoreError, match="page 2 is broken"):
        g.engine.complete(0, 2, 1)


def test_a_failed_copy_is_a_store_error_that_says_which_call_and_why(gpu):
    g = gpu()
    g.fake.plan.arm("cuMemcpyBatchAsync", NO)
    with pytest.raises(StoreError) as info:
        g.demand({0: 1, 5: 9})
    error = info.value
    assert (error.code, error.where) == ("FM304", "cuMemcpyBatchAsync")
    assert "CUDA_ERROR_UNKNOWN" in error.what
    assert error.fix
    g.demand({0: 1, 5: 9})
    g.expect(5, 9)


def test_what_was_copied_of_a_demand_that_failed_does_not_come_later(gpu):
    """Nothing waits for the copy any more, and its slot may belong to another page."""
    g = gpu(version=12040, pace="kernels")
    g.fake.plan.arm("cuMemcpyHtoDAsync", NO, nth=2)
    with pytest.raises(StoreError, match="UNKNOWN"):
        g.demand({0: 1, 5: 9})
    g.prefetch({0: 3})
    g.engine.complete(0, 3, 0)
    g.fake.timeline.finish(KERNELS)
    g.fake.timeline.finish()
    g.expect(0, 3)


def test_a_copy_that_fails_under_way_is_told_by_the_next_call(gpu):
    g = gpu(pace="kernels")
    g.demand({0: 1})
    g.fake.lost = FakeDriver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(StoreError, match="ILLEGAL_ADDRESS") as info:
        g.demand({1: 2})
    assert "restart this process" in info.value.fix
    g.fake.lost = None


@pytest.mark.parametrize(
    ("site", "nth"),
    [("cuMemHostAlloc", 1), ("cuStreamCreateWithPriority", 1), ("cuStreamCreateWithPriority", 2)],
)
def test_a_carrier_that_cannot_be_made_leaves_nothing(site, nth):
    fake = FakeDriver(64)
    cuda = CudaDriver(fake)
    fake.plan.arm(site, NO, nth)
    with pytest.raises(SubstrateError, match="UNKNOWN"):
        slots = [[Exported(0, 1, part.nbytes, (dlpack.CUDA, 0)) for part in PAGE_CLASS.parts]]
        StreamCopier(cuda, host_store(Geometry(1, 4)), slots)
    cuda.close()
    assert not fake.live()
    fake.close()


SITES = [
    "cuCtxPushCurrent", "cuCtxPopCurrent", "cuCtxGetStreamPriorityRange", "cuCtxSynchronize",
    "cuStreamCreateWithPriority", "cuStreamDestroy", "cuStreamSynchronize", "cuStreamWaitEvent",
    "cuEventCreate", "cuEventRecord", "cuEventQuery", "cuEventSynchronize", "cuEventElapsedTime",
    "cuEventDestroy", "cuMemcpyBatchAsync", "cuMemcpyHtoDAsync", "cuMemcpyDtoDAsync",
    "cuMemHostAlloc", "cuMemFreeHost", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap",
    "cuMemRelease", "cuMemAddressReserve", "cuMemAddressFree", "cuMemsetD8Async",
]  # fmt: skip
#: Calls on which a site fails in turn: the first calls, and some later ones.
FIRST, LATER = 6, (9, 20, 47, 130)
PACES = ("copies", "kernels", "random")


@pytest.mark.parametrize("threads", [0, 1])  # pages from pinned memory, pages through buffers
@pytest.mark.parametrize("site", SITES)
def test_a_whole_memory_manager_lives_through_the_failure_of_any_call(site, threads):
    """Kernels read every returned slot late, and never read a wrong byte."""
    struck = 0
    for nth in (*range(1, FIRST + 1), *LATER):
        plan = FaultPlan()
        plan.arm(site, NO, nth)
        ground = rig = None
        with contextlib.suppress(FluxMoEError):  # at startup, the failure is only an error
            version = 12040 if site == "cuMemcpyHtoDAsync" else 13000
            pace = PACES[nth % len(PACES)]
            ground = FakeCuda(60, plan=plan, pace=pace, seed=nth, version=version)
            rig = Rig(
                3, 4, (8,), reserved=(12,), prefetch=NextLayer(), substrate=ground, threads=threads
            )
        if rig is not None:
            use(rig, np.random.default_rng(nth))
            ground.fake.timeline.finish()
        for each in filter(None, [rig, rig, ground, ground]):  # refused releases succeed now
            with contextlib.suppress(FluxMoEError):
                each.close()
        struck += plan.struck[site]
    # Without buffers and with few demands, nothing waits.
    assert struck or (site, threads) == ("cuEventSynchronize", 0)


def use(rig: Rig, rng: np.random.Generator) -> None:
    for event in range(30):
        try:
            if event % 7 == 6:
                rig.pager.resize(0, int(rng.integers(4, 13)))
            rig.acquire(event % 3, rng.choice(4, 3, replace=False).tolist())
        except (StoreError, SubstrateError) as error:
            assert "CUDA_ERROR_UNKNOWN" in str(error)
        rig.check()


def test_what_a_pinned_store_was_given_it_copies(gpu):
    g = gpu()
    store = PinnedStore(g.ground.cuda, Geometry(2, 4), PAGE_CLASS)
    layer = [rows[:4].copy() for rows in contents(8)]
    store.adopt(layer)
    for rows in layer:
        rows[...] = 0
    row = np.zeros(PAGE_CLASS.parts[1].nbytes, np.uint8)
    store.read_into(3, [np.zeros(PAGE_CLASS.parts[0].nbytes, np.uint8), row])
    np.testing.assert_array_equal(row, content(3, 1))
    with pytest.raises(StoreError, match="page 4 is not in the store"):
        store.addresses(4)
    with pytest.raises(StoreError, match="parts of shape"):
        store.adopt([rows[:2] for rows in layer])
    assert g.fake.live()["pinned"] == 2 + 2 * 6
    store.close()
    store.close()
    assert g.fake.live()["pinned"] == 2 * 6
