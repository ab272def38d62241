"""Reads by read threads: order, cancellation, waiting, and the effects of failures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fluxmoe import config
from fluxmoe.backends.runtime import Runtime
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.transfer.host import HostCopier
from fluxmoe.core.transfer.jobs import Job, JobPool, Urgency
from fluxmoe.core.transfer.store import AheadStore, reader
from fluxmoe.core.types import Loads
from fluxmoe.errors import ConfigError, PageFileError, StoreError
from fluxmoe.stores.coding import Coder
from fluxmoe.stores.disk import depth as depths
from fluxmoe.stores.disk import reads, residency
from fluxmoe.stores.disk.reader import LENGTH, DiskMeter, PageReader, sectors
from fluxmoe.stores.disk.reads import PageReads
from fluxmoe.stores.tiers import TieredStore
from tests.core.test_owner import status
from tests.forking import FORKS
from tests.stores.test_tiers import (
    GEOMETRY,
    PAGE_CLASS,
    PAGES,
    filled,
    in_file,
    layers,
    page_files,
    read_bytes,
    store_of,
)

CONTENTS = layers()
PATIENCE = 30.0


def arenas(slots: int = PAGES) -> list[np.ndarray]:
    """Make arenas whose slots begin at sector boundaries, like those of large pages."""
    return [np.full((slots, part.nbytes), 0xEE, np.uint8) for part in PAGE_CLASS.parts]


def holds(rows: list[np.ndarray], slot: int, page: int) -> bool:
    layer, expert = divmod(page, GEOMETRY.experts_per_layer)
    parts = zip(rows, CONTENTS[layer], strict=True)
    return all((array[slot] == part[expert]).all() for array, part in parts)


def untouched(rows: list[np.ndarray], slot: int) -> bool:
    return all((array[slot] == 0xEE).all() for array in rows)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def loads(pairs: dict[int, int]) -> Loads:
    """Convert ``{slot: page}`` to the event rule's ``Loads``."""
    return Loads(0, numbers(*pairs.values()), numbers(*pairs))


class Gate:
    """Replacement for ``PageReader.fetch``: reads of held pages wait; all reads are recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages: list[int] = []
        self.threads: dict[int, str] = {}
        self.held: dict[int, threading.Event] = {}
        self.most = self.flying = 0
        self.changed = threading.Condition()
        real = PageReader.fetch

        def fetch(file: PageReader, page: int, targets: list[np.ndarray]) -> None:
            with self.changed:
                self.pages.append(page)
                self.threads[page] = threading.current_thread().name
                self.flying += 1
                self.most = max(self.most, self.flying)
                self.changed.notify_all()
            if page in self.held:
                assert self.held[page].wait(PATIENCE)
            real(file, page, targets)
            with self.changed:
                self.flying -= 1

        monkeypatch.setattr(PageReader, "fetch", fetch)

    def hold(self, *pages: int) -> None:
        self.held |= {page: threading.Event() for page in pages}

    def let_go(self, *pages: int) -> None:
        for page in pages or self.held:
            self.held[page].set()

    def wait(self, *pages: int) -> None:
        """Wait until reads of all these pages have begun."""
        with self.changed:
            assert self.changed.wait_for(lambda: set(pages) <= set(self.pages), PATIENCE)


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.let_go()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    # Other test files leave models, with their threads, to the garbage collector.
    before = set(threading.enumerate())
    yield
    names = ("fluxmoe-read", "fluxmoe-copy", "fluxmoe-test")
    new = set(threading.enumerate()) - before
    assert not [thread.name for thread in new if thread.name.startswith(names)]


@pytest.fixture(autouse=True)
def cold(monkeypatch) -> None:
    """Make all pages uncached, because read threads do not read pages in the page cache."""
    monkeypatch.setattr(residency, "cached", lambda *_: False)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., TieredStore]]:
    stores = []

    def make(codec: str = "none", **more: object) -> TieredStore:
        stores.append(filled(in_file(tmp_path, codec, **more)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


codecs = pytest.mark.parametrize("codec", ["none", "fixed4"])
ALL = np.random.default_rng(0).permutation(PAGES)


# --- many pages in one call -----------------------------------------------------------------------


@codecs
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_one_call_reads_pages_into_their_slots_and_nothing_else(made, codec, direct, depth) -> None:
    store, rows = made(codec, direct=direct, depth=depth), arenas(PAGES + 1)
    assert isinstance(store, AheadStore) and store.depth == depth
    read = reader(store, rows)
    for _ in range(2):  # the second time, the checksums have been verified
        read(ALL, np.arange(PAGES))
        assert all(holds(rows, slot, page) for slot, page in enumerate(ALL.tolist()))
        assert untouched(rows, PAGES)
        for array in rows:
            array[...] = 0xEE


def test_slots_that_are_not_aligned_are_filled_too(made) -> None:
    around = [np.full(array.size + 1, 0xEE, np.uint8) for array in arenas()]
    rows = [a[1:].reshape(PAGES, -1) for a in around]
    reader(made("fixed4"), rows)(ALL, np.arange(PAGES))
    assert all(holds(rows, slot, page) for slot, page in enumerate(ALL.tolist()))
    assert all(a[0] == 0xEE for a in around)


def test_pages_of_several_stores_are_read_in_one_call(tmp_path: Path, gate: Gate) -> None:
    """The calling thread decodes the pages in memory while the first page of the file is read."""
    host = {"kind": "host", "codec": "fixed4", "limit": 200_000}
    store = filled(store_of([host, {"kind": "file", "path": str(tmp_path), "depth": 1}]))
    in_memory = len(store._tiers[0]._pages)
    assert 0 < in_memory < PAGES
    gate.hold(PAGES - 1)
    done = threading.Thread(target=reader(store, rows := arenas()), args=(ALL, ALL))
    done.start()
    gate.wait(PAGES - 1)
    gate.let_go()
    done.join(PATIENCE)
    assert all(holds(rows, page, page) for page in range(PAGES))
    assert sorted(gate.pages) == list(range(in_memory, PAGES))
    store.close()


@codecs
def test_each_page_is_read_from_the_disk_once(made, codec, monkeypatch) -> None:
    store, rows = made(codec, depth=3), arenas()
    file = store._tiers[0]._file
    if not file.direct:
        pytest.skip("this file system has no direct I/O")
    os.posix_fadvise(file._fd, 0, 0, os.POSIX_FADV_DONTNEED)
    monkeypatch.undo()
    if residency.cached(file._fd, 4096, 4096):
        pytest.skip("this file system keeps the file in memory")
    before = read_bytes()
    reader(store, rows)(ALL, ALL)
    engine = TransferEngine(HostCopier(store, [rows], threads=1), PAGE_CLASS.nbytes)
    engine.prefetch(loads({0: 3, 1: 5}))
    engine.complete(0, 3, 0)
    engine.complete(0, 5, 1)
    engine.close()
    time.sleep(0.3)  # a read-ahead may still be in progress
    lengths = [sum(map(sectors, entry)) for entry in file.index[..., LENGTH].tolist()]
    stored = sum(lengths) + lengths[3] + lengths[5]
    assert read_bytes() - before in (0, stored)  # 0 if the system does not count this disk
    assert not any(residency.cached(file._fd, 4096 + 4096 * i, 4096) for i in range(8))
    meter = file.meter
    assert meter.nbytes == stored and meter.seconds > 0
    reader(store, rows)(numbers(3), numbers(3))
    assert meter.nbytes == stored + lengths[3]
    runtime = SimpleNamespace(store=store, pager=SimpleNamespace(reset=lambda: None))
    seen = Runtime._disk(runtime)
    assert seen == {"disk_bytes": meter.nbytes, "disk_seconds": meter.seconds, "disk_depth": 3}
    Runtime.reset(runtime)
    assert Runtime._disk(runtime) == {"disk_bytes": 0, "disk_seconds": 0.0, "disk_depth": 3}


def test_the_time_of_reads_that_overlap_counts_once() -> None:
    meter, inside, outside = DiskMeter(), threading.Event(), threading.Event()

    def first() -> None:
        with meter.reading(10):
            inside.set()
            assert outside.wait(PATIENCE)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(PATIENCE)
    started = time.perf_counter()
    with meter.reading(5):
        time.sleep(0.05)
    assert meter.seconds == 0  # the other read is still in progress
    outside.set()
    thread.join()
    assert 0.05 <= meter.seconds <= time.perf_counter() - started + 1
    assert meter.nbytes == 15


# --- threads --------------------------------------------------------------------------------------


def test_reads_go_on_while_a_page_is_decoded(made, gate, monkeypatch) -> None:
    """Decoding the first page ends only after other threads have begun to read the last page."""
    store, decode, seen = made("fixed4", depth=2), Coder.decode, set()

    def waiting(self, kept, out) -> None:
        gate.wait(*range(PAGES))
        seen.add(threading.current_thread().name)
        decode(self, kept, out)

    monkeypatch.setattr(Coder, "decode", waiting)
    reader(store, rows := arenas())(ALL, ALL)
    assert all(holds(rows, page, page) for page in range(PAGES))
    assert seen == {threading.current_thread().name}
    by = [gate.threads[page].startswith("fluxmoe-read") for page in ALL.tolist()]
    assert by == [False] + [True] * (PAGES - 1)


@pytest.mark.parametrize("threads", [0, 1])
def test_prefetches_are_read_at_the_depth_of_the_store(made, gate, threads) -> None:
    """Three reads are in progress at once, regardless of the number of copy threads."""
    store, rows = made("fixed4", depth=3), arenas()
    engine = TransferEngine(HostCopier(store, [rows], threads=threads), PAGE_CLASS.nbytes)
    gate.hold(*range(PAGES))
    engine.prefetch(loads({page: page for page in range(PAGES)}))
    gate.wait(0, 1, 2)
    gate.let_go()
    for page in range(PAGES):
        engine.complete(0, page, page)
        assert holds(rows, page, page)
    assert gate.most in (3, 3 + threads) and sorted(set(gate.pages)) == list(range(PAGES))
    engine.close()


def test_what_a_layer_waits_for_is_read_before_prefetches(made, gate) -> None:
    store, rows = made(depth=1), arenas()
    engine = TransferEngine(HostCopier(store, [rows], threads=0), PAGE_CLASS.nbytes)
    gate.hold(0, 8)
    engine.prefetch(loads({0: 0, 1: 1, 2: 2}))
    gate.wait(0)
    done = threading.Thread(target=engine.demand, args=(loads({8: 8, 9: 9, 10: 10}),))
    done.start()
    gate.wait(8)  # by the calling thread, while the read thread is busy
    gate.let_go(0)
    gate.wait(9, 10, 1, 2)
    gate.let_go(8)
    done.join(PATIENCE)
    assert gate.pages == [0, 8, 9, 10, 1, 2]
    assert all(holds(rows, page, page) for page in (8, 9, 10))
    engine.close()


def test_a_prefetch_that_has_not_begun_can_be_cancelled(made, gate) -> None:
    store, rows = made("fixed4", depth=1), arenas()
    engine = TransferEngine(HostCopier(store, [rows], threads=0), PAGE_CLASS.nbytes)
    gate.hold(0)
    engine.prefetch(loads({0: 0, 1: 1, 2: 2}))
    gate.wait(0)
    engine.demand(loads({1: 7}))  # takes the slot of page 1
    engine.complete(0, 2, 2)  # is read at once, not after page 0
    assert holds(rows, 1, 7) and holds(rows, 2, 2)
    gate.let_go()
    engine.complete(0, 0, 0)
    assert holds(rows, 0, 0) and not engine.busy
    engine.close()
    store.close()  # the thread has emptied its queue
    assert gate.pages == [0, 7, 2]
    assert holds(rows, 1, 7)


def test_a_slot_is_not_given_away_while_it_is_being_read_into(made, gate) -> None:
    store, rows = made(depth=1), arenas()
    engine = TransferEngine(HostCopier(store, [rows], threads=0), PAGE_CLASS.nbytes)
    gate.hold(0)
    engine.prefetch(loads({0: 0}))
    gate.wait(0)
    done = threading.Thread(target=engine.demand, args=(loads({0: 7}),))
    done.start()
    done.join(0.05)
    assert done.is_alive()
    gate.let_go()
    done.join(PATIENCE)
    assert holds(rows, 0, 7)
    engine.close()


@codecs
def test_pages_that_are_read_faster_than_they_are_decoded_take_no_more_memory(made, codec) -> None:
    """No page is decoded before all reads have ended, so three buffers are not enough."""
    store, rows = made(codec, depth=1), arenas()
    ahead = [store.ahead(rows)(page, page) for page in range(PAGES)]
    for each in ahead:
        each.begin(Urgency.AHEAD)
    for each in ahead:
        assert each._job._ended.wait(PATIENCE)
    rooms = store._tiers[0]._reads._rooms
    assert len(rooms) == (0 if codec == "fixed4" else 3)
    parked = [each._room is None for each in ahead]
    assert parked.count(False) == (3 if codec == "fixed4" else 0)
    for each in reversed(ahead):
        each.finish()
    assert all(holds(rows, page, page) for page in range(PAGES))
    assert len(rooms) == 3


@pytest.mark.parametrize(("pages", "count"), [(0.9, 0), (2.5, 2), (100, 5)])
def test_buffers_for_coded_pages_are_limited(made, monkeypatch, pages, count) -> None:
    one = sum(sectors(part.nbytes) for part in PAGE_CLASS.parts)
    monkeypatch.setattr(reads, "BUFFERS", int(pages * one))
    store, rows = made("fixed4", depth=3), arenas()
    assert len(store._tiers[0]._reads._rooms) == count
    reader(store, rows)(ALL, ALL)
    assert all(holds(rows, page, page) for page in range(PAGES))


def test_a_page_whose_decoding_was_interrupted_is_complete_the_second_time(
    made, monkeypatch, caplog
) -> None:
    store, rows = made("fixed4", depth=1), arenas()
    store._tiers[0]._reads._rooms.clear()  # so that the page is decoded within its slot
    decode, interruptions = Coder.decode, [KeyboardInterrupt()]

    def interrupted(self, kept, out) -> None:
        decode(self, kept, out)
        if interruptions:
            raise interruptions.pop()

    monkeypatch.setattr(Coder, "decode", interrupted)
    for verified in range(2):
        engine = TransferEngine(HostCopier(store, [rows], threads=0), PAGE_CLASS.nbytes)
        engine.prefetch(loads({0: 4}))
        engine._queued[0, 0]._read._job._ended.wait(PATIENCE)
        interruptions[:] = [KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            engine.complete(0, 4, 0)
        engine.complete(0, 4, 0)
        assert holds(rows, 0, 4) and store._tiers[0]._file.verified[4], verified
        engine.close()
    assert not caplog.records  # decoded bytes were not mistaken for coded bytes


def test_cached_pages_are_left_to_the_threads_that_need_them(made, gate, monkeypatch) -> None:
    store, rows = made("fixed4", depth=2), arenas()
    monkeypatch.setattr(residency, "cached", lambda *_: True)
    reader(store, rows)(ALL, ALL)
    assert store.ahead(rows)(0, 0) is None
    assert all(holds(rows, page, page) for page in range(PAGES))
    assert set(gate.threads.values()) == {threading.current_thread().name}
    assert store.meters[0].nbytes == 0


# --- failures -------------------------------------------------------------------------------------


@codecs
@pytest.mark.parametrize("begun", [False, True])
def test_a_thread_that_dies_keeps_nobody_waiting(made, codec, begun, monkeypatch) -> None:
    store, rows, real = made(codec, depth=2), arenas(), Job.run
    died, read = threading.Semaphore(0), PageReads._read

    def die(job: Job) -> None:
        if not threading.current_thread().name.startswith("fluxmoe-read"):
            return real(job)
        job._begun = begun
        died.release()
        raise SystemExit

    def late(*args) -> None:
        """Read in the calling thread, but not before both threads have died."""
        assert died.acquire(timeout=PATIENCE) and died.acquire(timeout=PATIENCE)
        died.release(2)
        read(*args)

    monkeypatch.setattr(Job, "run", die)
    monkeypatch.setattr(PageReads, "_read", late)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    for threads in (0, 1):
        engine = TransferEngine(HostCopier(store, [rows], threads=threads), PAGE_CLASS.nbytes)
        engine.demand(loads(dict(enumerate(ALL.tolist()))))
        assert all(holds(rows, slot, page) for slot, page in enumerate(ALL.tolist()))
        engine.prefetch(loads({0: 4, 1: 5, 2: 6}))
        for slot in range(3):
            engine.complete(0, slot + 4, slot)
            assert holds(rows, slot, slot + 4)
        engine.close()


def test_a_copy_thread_that_dies_leaves_no_read_behind(made, gate, monkeypatch) -> None:
    """A read left behind could end after another page has been read into the slot."""
    store, rows, real = made("fixed4", depth=1), arenas(), Job.run
    died = threading.Event()

    def die(job: Job) -> None:
        if threading.current_thread().name.startswith("fluxmoe-read"):
            return real(job)
        gate.wait(0)  # the read has begun
        job._begun = True
        died.set()
        raise SystemExit

    monkeypatch.setattr(Job, "run", die)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = TransferEngine(HostCopier(store, [rows], threads=1), PAGE_CLASS.nbytes)
    gate.hold(0)
    engine.prefetch(loads({0: 0}))
    assert died.wait(PATIENCE)
    done = threading.Thread(target=engine.demand, args=(loads({0: 7}),))
    done.start()
    done.join(0.05)
    assert done.is_alive()
    gate.let_go()
    done.join(PATIENCE)
    assert holds(rows, 0, 7)
    engine.close()


@codecs
def test_one_damaged_page_among_many_is_noticed_and_sets_the_file_aside(
    made, codec, tmp_path, caplog
) -> None:
    store, rows = made(codec, depth=2), arenas()
    file = store._tiers[0]._file
    offset = int(file.index[5, 1, 0]) + 700
    with file.path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 8]))
    read = reader(store, rows)
    with pytest.raises(PageFileError, match=r"part 1 of page 5 is damaged.*start again") as info:
        read(np.arange(PAGES), np.arange(PAGES))
    assert info.value.code == "FM307" and caplog.text.count("retrying once") == 1
    assert [path.suffix for path in page_files(tmp_path)] == [".damaged"]
    others = np.delete(np.arange(PAGES), 5)
    read(others, others)
    assert all(holds(rows, page, page) for page in others.tolist())
    assert len(store._tiers[0]._reads._rooms) == 4


def test_nothing_is_read_any_more_after_an_error(made, gate) -> None:
    """The slots of a failed event are given to other pages."""
    store, rows = made(depth=1), arenas()
    real, gate.held = PageReader.verify, {}

    def damaged(file: PageReader, page: int, targets) -> None:
        if page == 3:
            gate.wait(4)  # is being read by the thread
            raise StoreError("page 3 is broken")
        real(file, page, targets)

    gate.hold(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageReader, "verify", damaged)
        pages = numbers(3, 4, 5, 6)
        failed: list[str] = []

        def attempt() -> None:
            try:
                reader(store, rows)(pages, pages)
            except StoreError as error:
                failed.append(error.what)

        done = threading.Thread(target=attempt)
        done.start()
        done.join(0.1)
        assert done.is_alive()  # until page 4 has been read
        gate.let_go()
        done.join(PATIENCE)
    assert failed == ["page 3 is broken"]
    store.close()
    assert 5 not in gate.pages and untouched(rows, 6)


def test_a_read_that_fails_once_in_a_thread_is_made_again(made, monkeypatch, caplog) -> None:
    store, rows = made("fixed4", depth=2), arenas()
    real, failed, both = os.preadv, [], threading.Event()

    def preadv(*args):
        if not threading.current_thread().name.startswith("fluxmoe-read"):
            assert both.wait(PATIENCE)
        elif len(failed) < 2:
            failed.append(args)
            if len(failed) == 2:
                both.set()
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    reader(store, rows)(ALL, ALL)
    assert all(holds(rows, page, page) for page in range(PAGES))
    assert caplog.text.count("Input/output error") == 2
    monkeypatch.setattr(os, "preadv", lambda *_: os.read(-1, 1))
    with pytest.raises(StoreError, match=r"cannot be read at .*Bad file descriptor"):
        reader(store, rows)(ALL, ALL)


def test_whatever_a_read_raises_is_a_store_error(made, monkeypatch) -> None:
    store, rows = made(depth=2), arenas()
    monkeypatch.setattr(PageReader, "fetch", lambda *_: 1 // 0)
    with pytest.raises(StoreError, match=r"one of the pages .* cannot be read: ZeroDivisionError"):
        reader(store, rows)(ALL, ALL)


@pytest.mark.parametrize("page", [-1, PAGES, 2**40])
def test_a_page_that_is_not_there_is_an_error_when_it_is_needed(made, page) -> None:
    store, rows = made(), arenas()
    with pytest.raises(StoreError, match=f"page {page} is not in the store"):
        reader(store, rows)(numbers(1, page), numbers(1, 2))
    for threads in (0, 1):
        engine = TransferEngine(HostCopier(store, [rows], threads=threads), PAGE_CLASS.nbytes)
        engine.prefetch(loads({2: page}))
        with pytest.raises(StoreError, match=f"page {page} is not in the store"):
            engine.complete(0, page, 2)
        engine.close()


def test_closing_waits_for_reads_and_stops_the_threads(made, gate) -> None:
    store, rows = made(depth=2), arenas()
    read = reader(store, rows)
    ahead = store.ahead(rows)(3, 3)
    gate.hold(3)
    ahead.begin(Urgency.AHEAD)
    gate.wait(3)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    gate.let_go()
    closing.join(PATIENCE)
    assert not closing.is_alive() and store.depth == 0
    ahead.finish()
    assert holds(rows, 3, 3)
    store.close()
    with pytest.raises(StoreError, match="page 0 is not in the store"):
        read(numbers(0), numbers(0))


def test_a_store_that_is_closed_in_the_middle_of_a_call_ends_the_call(made, gate) -> None:
    store, rows, ended = made(depth=1), arenas(), []

    def attempt() -> None:
        try:
            reader(store, rows)(np.arange(PAGES), np.arange(PAGES))
        except StoreError as error:
            ended.append(error.code)
        else:
            ended.append("all read")

    gate.hold(0, 1)
    calling = threading.Thread(target=attempt)
    calling.start()
    gate.wait(0, 1)
    closing = threading.Thread(target=store.close)
    closing.start()
    gate.let_go()
    for thread in (calling, closing):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert ended in (["all read"], ["FM307"])


@pytest.mark.parametrize("fork", FORKS)
def test_a_forked_child_reads_without_the_threads(made, fork) -> None:
    store, rows = made("fixed4", depth=2), arenas()
    read = reader(store, rows)
    read(numbers(1, 2, 3), numbers(1, 2, 3))

    def child() -> None:
        read(ALL, ALL)
        assert all(holds(rows, page, page) for page in range(PAGES))
        assert store.ahead(rows)(0, 0) is None
        store.close()

    assert status(child, fork) == 0
    read(numbers(4, 5, 6), numbers(4, 5, 6))
    assert holds(rows, 6, 6) and untouched(rows, 0)


def test_threads_that_cannot_be_started_are_an_error_at_the_start(tmp_path, monkeypatch) -> None:
    start = threading.Thread.start

    def one_only(thread: threading.Thread) -> None:
        if thread.name == "fluxmoe-read-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one_only)
    store = in_file(tmp_path, depth=3)
    with pytest.raises(ConfigError, match="3 read threads cannot be started") as info:
        filled(store)
    assert info.value.where == "stores.depth" and info.value.fix == "lower it"
    store.close()


# --- pools ----------------------------------------------------------------------------------------


def test_a_pool_begins_urgent_jobs_first_and_equal_ones_in_order() -> None:
    pool, begun, gate = JobPool(1, "test", where="here"), [], threading.Event()
    pool.order(Job(lambda: gate.wait(PATIENCE) and None), Urgency.DEMAND)
    ahead = [Job(lambda n=n: begun.append(n)) for n in range(4)]
    for job in ahead:
        pool.order(job, Urgency.AHEAD)
    pool.order(Job(lambda: begun.append("demand")), Urgency.DEMAND)
    pool.order(Job(lambda: begun.append("demand, later")), Urgency.DEMAND)
    assert ahead[2].withdraw()
    gate.set()
    pool.close()
    pool.close()
    assert begun == ["demand", "demand, later", 0, 1, 3]


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "depth"),
    [([60, 97, 100, 99], 2), ([100, 99, 98, 104], 1), ([10, 20, 40, 80], 8), ([1, 2, 3, 3], 4)],
)
def test_the_depth_is_the_least_that_is_about_as_fast_as_any(rates, depth, monkeypatch) -> None:
    known = dict(zip([1, 2, 4, 8], rates, strict=True))
    monkeypatch.setattr(depths, "_ROUNDS", 60.0)  # even if the test is stopped for a while
    monkeypatch.setattr(depths, "rate", lambda read, depth: (known[depth], 0.001))
    assert depths.choose(lambda: 1) == (depth, known[depth])


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_the_rate_at_a_depth_is_that_of_as_many_reads_at_once(depth, monkeypatch) -> None:
    monkeypatch.setattr(depths, "_ROUND", 1.0)
    together, threads = threading.Barrier(depth), set()

    def read() -> int:
        if threading.current_thread() not in threads:
            threads.add(threading.current_thread())
            together.wait(PATIENCE)
        time.sleep(0.01)
        return 1000

    rate, longest = depths.rate(read, depth)
    assert len(threads) == depth and 0 < rate <= depth * 1000 / 0.01 and longest >= 0.01


def test_a_read_that_is_not_complete_in_time_counts_in_part() -> None:
    rate, longest = depths.rate(lambda: time.sleep(0.2) or 1000, 1)
    assert 0 < rate <= 1000 / 0.2 and longest >= 0.2


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.12])
def test_measuring_the_depth_takes_less_than_it_may(seconds, monkeypatch) -> None:
    """On a slow disk, the measurement does not begin reads that would end too late."""
    clock = FakeClock()
    monkeypatch.setattr(depths, "time", clock)
    monkeypatch.setattr(depths, "rate", clock.rate(seconds))
    depths.choose(lambda: 1000)
    assert clock.now <= depths._ROUNDS
    assert clock.depths == [1, 2, 4, 8][: {0.001: 4, 0.05: 2, 0.12: 1}[seconds]]


class FakeClock:
    """A clock that advances by the duration of reads on a disk that reads one page at a time."""

    def __init__(self) -> None:
        self.now, self.depths = 0.0, []

    def perf_counter(self) -> float:
        return self.now

    def rate(self, seconds: float):
        def rate(read, depth: int) -> tuple[float, float]:
            self.depths.append(depth)
            self.now += depths._ROUND + seconds * depth
            return 1000 / seconds, seconds * depth

        return rate


def test_a_large_file_is_measured_with_direct_reads_of_its_pages(made, monkeypatch, caplog) -> None:
    store = made("fixed4")
    assert store.depth == depths.DEPTH
    file = store._tiers[0]._file
    if not file.direct:
        pytest.skip("this file system has no direct I/O")
    offsets, real, seen = set(file.index[:, 0, 0].tolist()), os.preadv, []

    def preadv(fd, rooms, offset) -> int:
        seen.append((fd, offset))
        return real(fd, rooms, offset)

    monkeypatch.setattr(depths, "_SMALL", 1)
    monkeypatch.setattr(os, "preadv", preadv)
    caplog.set_level("INFO", "fluxmoe")
    assert depths.measured(file) in (1, 2, 4, 8)
    assert "reads at once" in caplog.text
    assert {fd for fd, _ in seen} == {file._direct} and {at for _, at in seen} <= offsets
    assert len({at for _, at in seen}) > 1
    monkeypatch.setattr(os, "preadv", lambda *_: os.read(-1, 1))
    assert depths.measured(file) == depths.DEPTH
    assert "cannot be measured" in caplog.text


@pytest.mark.parametrize(("value", "depth"), [("auto", None), (None, None), (1, 1), (64, 64)])
def test_a_depth_is_auto_or_a_number(value, depth) -> None:
    store = {"kind": "file", "path": "p", "depth": value}
    parsed = config.parse({"memory": {"budget": "1MiB"}, "stores": [store]}, where="test")
    assert parsed.stores[0].depth == depth


@pytest.mark.parametrize("value", [0, 65, "many", 1.5])
def test_other_depths_are_refused(value) -> None:
    store = {"kind": "file", "path": "p", "depth": value}
    with pytest.raises(ConfigError, match=r"stores\.0\.depth"):
        config.parse({"memory": {"budget": "1MiB"}, "stores": [store]}, where="test")
