from __future__ import annotations

import signal

import numpy as np
import pytest

from fluxmoe.core.transfer import host as transfer_host
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.transfer.host import HostCopier
from fluxmoe.core.transfer.store import BatchStore, read, reader
from fluxmoe.core.types import Geometry, Loads, PageClass, Part
from fluxmoe.errors import StoreError
from fluxmoe.stores.host import HostStore
from tests.core.rig import PAGE_CLASS, Rig, content, contents, host_store


def rows() -> list[np.ndarray]:
    return [np.zeros(part.nbytes, np.uint8) for part in PAGE_CLASS.parts]


def test_every_page_comes_back_as_it_was_adopted():
    store = host_store(Geometry(3, 4))
    for page in range(12):
        store.read_into(page, target := rows())
        for part, row in enumerate(target):
            np.testing.assert_array_equal(row, content(page, part))
    assert store.nbytes == 12 * PAGE_CLASS.nbytes


def test_layers_are_adopted_without_a_copy():
    store = HostStore(Geometry(1, 2), PageClass((Part("w", 3, 3),)))
    weights = np.zeros((2, 3), np.uint8)
    store.adopt([weights])
    weights[1] = 7
    store.read_into(1, [row := np.zeros(3, np.uint8)])
    assert row.tolist() == [7, 7, 7]


@pytest.mark.parametrize("page", [-1, 4, 12])
def test_a_page_that_is_not_there_is_an_error(page):
    store = HostStore(Geometry(3, 4), PAGE_CLASS)
    store.adopt([np.zeros((4, part.nbytes), np.uint8) for part in PAGE_CLASS.parts])
    with pytest.raises(StoreError, match=f"page {page} is not in the store"):
        store.read_into(page, rows())


def test_closing_forgets_the_pages_and_is_idempotent():
    store = host_store(Geometry(1, 2))
    store.close()
    store.close()
    assert store.nbytes == 0
    with pytest.raises(StoreError):
        store.read_into(0, rows())


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ([(2, 3), (2, 4)], np.uint8, r"parts of shape \[\(2, 3\), \(2, 4\)\], expected"),
        ([(2, 3)], np.uint8, "expected"),
        ([(3, 3), (3, 5)], np.uint8, "expected"),
        ([(2, 3), (2, 5)], np.int8, "expected uint8"),
        ([(2, 3), (2, 5)], "transposed", "not contiguous"),
    ],
)
def test_a_layer_of_another_layout_is_refused(shapes, dtype, message):
    store = HostStore(Geometry(1, 2), PageClass((Part("a", 3, 3), Part("b", 5, 5))))
    with pytest.raises(StoreError, match=message):
        if dtype == "transposed":
            store.adopt([np.zeros(shape[::-1], np.uint8).T for shape in shapes])
        store.adopt([np.zeros(shape, dtype) for shape in shapes])
    assert store.nbytes == 0


def test_a_layer_too_many_is_refused():
    with pytest.raises(StoreError, match="already has all 1 layers"):
        store = host_store(Geometry(1, 2))
        store.adopt([np.zeros((2, part.nbytes), np.uint8) for part in PAGE_CLASS.parts])


# --- many pages in one call ----------------------------------------------------------------------

EMPTY = 0xAB


def arenas(slots: int) -> list[np.ndarray]:
    return [np.full((slots, part.nbytes), EMPTY, np.uint8) for part in PAGE_CLASS.parts]


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def assert_hold(rows: list[np.ndarray], held: dict[int, int]) -> None:
    """Check that the slots hold these pages, and that no other row was touched."""
    for part, array in enumerate(rows):
        for slot, row in enumerate(array):
            want = content(held[slot], part) if slot in held else EMPTY
            np.testing.assert_array_equal(row, want, f"slot {slot}, part {part}")


def test_one_call_copies_pages_of_all_layers_into_their_slots_and_nothing_else():
    store, rows = host_store(Geometry(3, 4)), arenas(9)
    assert isinstance(store, BatchStore)
    reader(store, rows)(numbers(11, 0, 5, 4), numbers(7, 8, 0, 3))
    assert_hold(rows, {7: 11, 8: 0, 0: 5, 3: 4})


def test_a_reader_knows_layers_that_are_adopted_later_and_none_after_the_end():
    store, rows = HostStore(Geometry(2, 4), PAGE_CLASS), arenas(2)
    read = reader(store, rows)
    for first in (0, 4):
        with pytest.raises(StoreError, match=f"page {first} is not in the store"):
            read(numbers(first), numbers(0))
        store.adopt([array[first : first + 4] for array in contents(8)])
        read(numbers(first), numbers(0))
    assert_hold(rows, {0: 4})
    store.close()
    with pytest.raises(StoreError, match="page 4 is not in the store"):
        read(numbers(4), numbers(1))
    assert_hold(rows, {0: 4})


@pytest.mark.parametrize("page", [-1, 12, 2**40])
def test_a_page_that_is_not_there_is_an_error_among_many(page):
    read = reader(host_store(Geometry(3, 4)), arenas(3))
    with pytest.raises(StoreError, match=f"page {page} is not in the store"):
        read(numbers(1, page, 2), numbers(0, 1, 2))


@pytest.mark.parametrize("slot", [-1, 3])
def test_no_slot_outside_the_arena_is_written(slot):
    around = [np.full((5, part.nbytes), EMPTY, np.uint8) for part in PAGE_CLASS.parts]
    read = reader(host_store(Geometry(3, 4)), [array[1:4] for array in around])
    with pytest.raises(StoreError, match=r"one of the pages \[1\] cannot be read: .*no such slot"):
        read(numbers(1), numbers(slot))
    assert_hold(around, {})


def test_arenas_of_another_layout_are_refused():
    store = host_store(Geometry(3, 4))
    for wrong in (arenas(2)[::-1], arenas(2)[:1], [array[::2] for array in arenas(4)]):
        with pytest.raises(StoreError, match="do not match"):
            store.reader(wrong)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_share_the_pages_of_one_event(threads, monkeypatch):
    monkeypatch.setattr(transfer_host, "_SHARE", 1)
    rows = arenas(12)
    engine = TransferEngine(HostCopier(host_store(Geometry(3, 4)), [rows], threads=threads), 1)
    pages = np.random.default_rng(0).permutation(12)
    engine.demand(Loads(0, pages, np.arange(12)))
    engine.close()
    assert_hold(rows, dict(enumerate(pages.tolist())))
    assert engine.bytes_demand == 12


def test_a_failed_event_leaves_none_of_its_pages_resident():
    rig, store = Rig(slots=(8,)), HostStore(Geometry(3, 4), PAGE_CLASS)
    try:
        if rig.gpu is not None:
            pytest.skip("a GPU reads the pages by itself")
        rig.pager._transfer = TransferEngine(HostCopier(store, rig.rows), PAGE_CLASS.nbytes)
        store.adopt([array[:4] for array in contents(12)])
        rig.acquire(0, [0, 1])
        with pytest.raises(StoreError, match="page 5 is not in the store"):
            rig.acquire(1, [1, 2])
        assert rig.resident == {0, 1}
        rig.check()
        store.adopt([array[4:8] for array in contents(12)])
        rig.acquire(1, [1, 2])  # checks the bytes
        assert rig.resident == {0, 1, 5, 6}
    finally:
        rig.pager.transfer.close()
        rig.close()


def test_the_exception_of_a_signal_handler_is_not_an_error_of_the_store() -> None:
    """Such as the TimeoutError of an alarm, which is an OSError."""

    def late(*_):
        raise TimeoutError

    class Slow(HostStore):
        def read_into(self, page, parts):
            signal.raise_signal(signal.SIGUSR1)

        def reader(self, arenas):
            return lambda pages, slots: signal.raise_signal(signal.SIGUSR1)

    store = Slow(Geometry(1, 2), PAGE_CLASS)
    before = signal.signal(signal.SIGUSR1, late)
    try:
        arenas = [np.zeros((2, part.nbytes), np.uint8) for part in PAGE_CLASS.parts]
        with pytest.raises(TimeoutError):
            read(store, 0, [rows[0] for rows in arenas])
        with pytest.raises(TimeoutError):
            reader(store, arenas)(np.array([0]), np.array([0]))
    finally:
        signal.signal(signal.SIGUSR1, before)
