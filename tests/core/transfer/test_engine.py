"""Copies: order, waiting, and the effects of a failing store."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.host import CpuSubstrate
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.transfer.host import HostCopier
from fluxmoe.core.transfer.jobs import Job, JobPool, Urgency
from fluxmoe.core.types import Geometry, Loads
from fluxmoe.cuda.fake.timeline import KERNELS
from fluxmoe.cuda.streams import StreamCopier
from fluxmoe.errors import ConfigError, FluxMoEError, StoreError
from fluxmoe.testing.faults import FaultyAddressedStore, FaultyStore
from tests.core.rig import FRAME, PAGE_CLASS, FakeCuda, content, fake_cuda, host_store

EMPTY = 0xAB


SLOTS = 6


class ReadingStore(FaultyStore):
    """A store with one read thread, which reads prefetched pages."""

    def __init__(self, store) -> None:
        super().__init__(store)
        self.pool = JobPool(1, "read", where="test")

    def reader(self, arenas):
        def read(pages, slots) -> None:
            for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
                self.read_into(page, [rows[slot] for rows in arenas])

        return read

    def ahead(self, arenas):
        return lambda page, slot: _Read(self, page, [rows[slot] for rows in arenas])

    def close(self) -> None:
        self.pool.close()
        super().close()


class _Read:
    """The read of one page by the read thread of a ``ReadingStore``."""

    def __init__(self, store: ReadingStore, page: int, parts) -> None:
        self._pool, self._job = store.pool, Job(lambda: store.read_into(page, parts))
        self._here = lambda: store.read_into(page, parts)

    def begin(self, urgency: Urgency) -> None:
        self._pool.order(self._job, urgency)

    def withdraw(self) -> bool:
        return self._job.withdraw()

    def finish(self) -> None:
        if self._job.withdraw():
            self._here()
        elif error := self._job.error():
            raise error

    def settle(self) -> None:
        if not self._job.withdraw():
            self._job.error()


class Engine(TransferEngine):
    """A transfer engine over two banks.

    Args:
        way: Number of copy threads; "reads": a thread of the store and no copy thread; "both": one
            of each; or, on a GPU, the source of its pages: pinned memory or buffers.
    """

    def __init__(self, way: int | str) -> None:
        host = isinstance(way, int) or way in ("reads", "both")
        substrate = CpuSubstrate(40, FRAME) if host else FakeCuda(40, pace="random")
        self.ground = substrate
        self.gpu = fake_cuda(substrate)
        self.tenant = ExpertTenant(FramePool(40, FRAME), substrate, PAGE_CLASS, [SLOTS] * 2)
        for bank in range(2):
            self.tenant.resize(bank, SLOTS)
        self.arrays = [self.tenant.rows(bank) for bank in range(2)]
        for rows in self.arrays[0] + self.arrays[1]:
            rows[...] = EMPTY
        geometry = Geometry(3, 4)
        if way == "pinned":
            self.store = FaultyAddressedStore(host_store(geometry, self.gpu.cuda))
        elif way in ("reads", "both"):
            self.store = ReadingStore(host_store(geometry))
        else:
            self.store = FaultyStore(host_store(geometry))
        super().__init__(self._carrier_for(way), PAGE_CLASS.nbytes)

    def _carrier_for(self, way):
        try:
            if self.gpu is None:
                threads = {"reads": 0, "both": 1}.get(way, way)
                return HostCopier(self.store, self.arrays, threads=threads)
            slots = [self.tenant.export(bank) for bank in range(2)]
            return StreamCopier(self.gpu.cuda, self.store, slots, ahead=PAGE_CLASS.nbytes)
        except FluxMoEError:
            self.tenant.close()
            raise

    def end(self) -> None:
        self.close()
        self.store.close()
        self.tenant.close()
        self.ground.close()

    def holds(self, slot: int, page: int | None, bank: int = 0) -> bool:
        """Return True if a slot holds ``page`` or, if ``page`` is None, was never written to."""
        if self.gpu is not None:  # the bytes that a kernel launched now would read
            seen = []
            self.gpu.fake.launch(lambda: seen.append(self._holds(slot, page, bank)))
            self.gpu.fake.timeline.finish(KERNELS)
            return seen[0]
        return self._holds(slot, page, bank)

    def _holds(self, slot: int, page: int | None, bank: int) -> bool:
        return all(
            np.array_equal(rows[slot], content(page, part))
            if page is not None
            else bool(np.all(rows[slot] == EMPTY))
            for part, rows in enumerate(self.arrays[bank])
        )


def loads(pairs: dict[int, int], bank: int = 0) -> Loads:
    """Convert ``{slot: page}`` to the event rule's ``Loads``."""
    return Loads(bank, np.array(list(pairs.values())), np.array(list(pairs)))


@pytest.fixture
def engine(request):
    before = threading.enumerate()
    engine = Engine(getattr(request, "param", 1))
    yield engine
    for page in list(engine.store._gates):
        engine.store.let_go(page)
    engine.end()
    assert not [
        thread
        for thread in threading.enumerate()
        if thread not in before and thread.name.startswith(("fluxmoe-copy", "fluxmoe-read"))
    ]


threads = pytest.mark.parametrize(
    "engine", [0, 1, 3, "reads", "both", "pinned", "buffers"], indirect=True
)
#: One thread that reads prefetched pages, so that their order is certain.
single = pytest.mark.parametrize("engine", [1, "reads"], indirect=True)


@threads
def test_demand_has_copied_when_it_returns(engine):
    engine.demand(loads({0: 3, 4: 7, 1: 0, 2: 11, 5: 2}))
    engine.demand(loads({3: 9}, bank=1))
    assert all(engine.holds(s, p) for s, p in [(0, 3), (4, 7), (1, 0), (2, 11), (5, 2)])
    assert engine.holds(3, None)
    assert engine.holds(3, 9, bank=1)
    assert engine.bytes_demand == 6 * PAGE_CLASS.nbytes
    assert engine.gpu or engine.stall_seconds > 0  # a GPU reports stalls later
    assert not engine.busy


@threads
def test_prefetch_has_copied_when_completed(engine):
    engine.prefetch(loads({0: 3, 4: 7}))
    for slot, page in [(4, 7), (0, 3)]:
        engine.complete(0, page, slot)
        assert engine.holds(slot, page)
    engine.complete(0, 5, 2)  # never queued: no effect
    assert not engine.busy
    assert engine.bytes_prefetch == 2 * PAGE_CLASS.nbytes


@single
def test_completing_a_copy_that_no_thread_has_begun_makes_it_here(engine):
    engine.store.hold(1)
    engine.prefetch(loads({0: 1, 2: 5, 3: 6}))
    engine.store.wait_until_reading(1)
    engine.complete(0, 5, 2)  # waiting for the thread would take forever
    assert engine.holds(2, 5)
    engine.store.let_go(1)
    engine.complete(0, 6, 3)
    engine.complete(0, 1, 0)
    assert sorted(engine.store.reads) == [1, 5, 6]  # each page once


@single
def test_a_slot_given_to_another_page_is_not_overwritten_by_the_copy_still_queued(engine):
    engine.store.hold(1)
    engine.prefetch(loads({0: 1, 2: 5}))
    engine.store.wait_until_reading(1)
    engine.demand(loads({2: 9}))
    engine.store.let_go(1)
    engine.complete(0, 1, 0)
    engine.demand(loads({3: 4, 4: 6}))  # meanwhile, the thread may reach the copy
    assert engine.holds(2, 9)
    assert 5 not in engine.store.reads


@single
@pytest.mark.parametrize("how", ["demand", "prefetch"])
def test_a_slot_given_to_another_page_waits_for_the_copy_under_way(engine, how):
    engine.store.hold(1)
    engine.prefetch(loads({0: 1}))
    engine.store.wait_until_reading(1)
    other = threading.Thread(target=getattr(engine, how), args=(loads({0: 9}),))
    other.start()
    other.join(0.05)
    assert other.is_alive()  # the new copy must wait until the old one has ended
    engine.store.let_go(1)
    other.join(10)
    assert not other.is_alive()
    engine.complete(0, 9, 0)
    assert engine.holds(0, 9)


def test_a_copy_is_noted_before_it_begins_and_until_it_has_ended(engine, monkeypatch):
    """An interruption must not leave an unrecorded copy, whose slot could go to another page."""
    noted = []

    def interrupted(copy, urgency):
        noted.append(copy in engine._queued.values())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._copier._copiers, "order", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.prefetch(loads({2: 3}))
    assert noted == [True]
    engine.complete(0, 3, 2)
    assert engine.holds(2, 3)
    engine.prefetch(loads({1: 4}))
    with monkeypatch.context() as patch:
        patch.setattr(Job, "withdraw", lambda self: False)
        patch.setattr(Job, "error", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.complete(0, 4, 1)
    assert engine.busy
    engine.complete(0, 4, 1)
    assert engine.holds(1, 4) and not engine.busy


def interrupt(*_):
    raise KeyboardInterrupt


@single
def test_demand_does_not_wait_for_threads_that_are_busy_with_prefetches(engine):
    engine.store.hold(1)
    engine.prefetch(loads({0: 1, 1: 2}))
    engine.store.wait_until_reading(1)
    done = threading.Thread(target=engine.demand, args=(loads({2: 5, 3: 6, 4: 7, 5: 8}),))
    done.start()
    done.join(10)
    assert not done.is_alive()
    assert all(engine.holds(s, p) for s, p in [(2, 5), (3, 6), (4, 7), (5, 8)])


@threads
@pytest.mark.parametrize("broken", [3, 11])
def test_a_page_that_cannot_be_read_on_demand_raises(engine, broken):
    engine.store.broken = {broken}
    wanted = loads({0: 3, 4: 7, 1: 0, 2: 11})
    with pytest.raises(StoreError, match=f"page {broken} is broken"):
        engine.demand(wanted)
    assert engine.bytes_demand == 0
    engine.store.broken = set()
    engine.demand(wanted)
    assert all(engine.holds(s, p) for s, p in [(0, 3), (4, 7), (1, 0), (2, 11)])


@threads
def test_a_prefetch_that_fails_surfaces_when_the_page_is_used_and_only_then(engine):
    engine.store.broken = {5}
    engine.prefetch(loads({0: 4, 1: 5, 2: 6}))
    engine.complete(0, 4, 0)
    engine.complete(0, 6, 2)
    with pytest.raises(StoreError, match="page 5"):
        engine.complete(0, 5, 1)
    assert not engine.busy
    assert engine.holds(0, 4)
    assert engine.holds(2, 6)


@threads
def test_a_prefetch_that_failed_does_not_matter_to_the_slots_next_page(engine):
    engine.store.broken = {5}
    engine.prefetch(loads({1: 5}))
    engine.demand(loads({1: 6}))
    engine.prefetch(loads({1: 7}))
    engine.complete(0, 7, 1)
    assert engine.holds(1, 7)


@single
def test_settle_from_cancels_what_is_queued_for_high_slots_of_one_bank(engine):
    engine.store.hold(1)
    engine.prefetch(loads({0: 1, 1: 2, 3: 4, 5: 6}))
    engine.prefetch(loads({5: 7}, bank=1))
    engine.store.wait_until_reading(1)
    engine.settle_from(0, 3)
    engine.store.let_go(1)
    for bank, slot, page in [(0, 0, 1), (0, 1, 2), (1, 5, 7)]:
        engine.complete(bank, page, slot)
        assert engine.holds(slot, page, bank)
    assert engine.holds(3, None)
    assert engine.holds(5, None)
    assert not engine.busy


@single
def test_settle_from_waits_for_a_copy_under_way(engine):
    engine.store.hold(4)
    engine.prefetch(loads({3: 4}))
    engine.store.wait_until_reading(4)
    waiting = threading.Thread(target=engine.settle_from, args=(0, 2))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()  # memory must not be freed while being written
    engine.store.let_go(4)
    waiting.join(10)
    assert not waiting.is_alive()


@single
def test_reset_settles_everything_and_counts_from_nothing(engine):
    engine.store.hold(1)
    engine.demand(loads({4: 8}))
    engine.prefetch(loads({0: 1, 1: 2}))
    engine.store.wait_until_reading(1)
    engine.store.let_go(1)
    engine.reset()
    assert not engine.busy
    assert (engine.bytes_demand, engine.bytes_prefetch, engine.stall_seconds) == (0, 0, 0.0)


@threads
def test_close_drops_what_is_queued_and_is_idempotent(engine):
    engine.prefetch(loads({slot: slot + 1 for slot in range(6)}))
    engine.close()
    engine.close()
    assert not engine.busy


# --- misbehaving stores and threads ---------------------------------------------------------------


@threads
def test_whatever_a_store_raises_is_a_store_error(engine):
    wanted = loads({0: 3, 4: 7, 1: 0, 2: 11})
    engine.store.plan.arm("read", OSError(5, "the disk is gone"))
    with pytest.raises(StoreError, match=r"(page \d+|one of the pages .*) cannot be read: OSError"):
        engine.demand(wanted)
    engine.demand(wanted)
    assert engine.holds(2, 11)


@single
def test_what_would_end_a_copy_thread_does_not_end_the_engine(engine):
    engine.store.plan.arm("read", SystemExit())
    engine.prefetch(loads({0: 1}))
    while not engine.store.plan.struck:
        pass
    engine.complete(0, 1, 0)
    assert engine.holds(0, 1)


def test_a_thread_that_dies_with_a_copy_in_its_hands_keeps_nobody_waiting(engine, monkeypatch):
    begun, hook = threading.Event(), threading.excepthook

    def die(copy):
        copy._begun = True
        begun.set()
        raise SystemExit

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(Job, "run", die)
    engine.prefetch(loads({0: 1}))
    assert begun.wait(10)
    engine.complete(0, 1, 0)
    assert engine.holds(0, 1)
    engine.demand(loads({1: 2, 2: 3, 3: 4}))
    assert engine.holds(3, 4)
    monkeypatch.setattr(threading, "excepthook", hook)


def test_copy_threads_that_cannot_be_started_are_an_error_at_the_start(monkeypatch):
    start = threading.Thread.start

    def one_only(thread):
        if thread.name == "fluxmoe-copy-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one_only)
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="3 copy threads cannot be started"):
        Engine(3)
    new = set(threading.enumerate()) - before
    assert not [thread for thread in new if thread.name.startswith("fluxmoe-copy")]
