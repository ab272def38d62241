"""Exceptions that pass a guard: only those that request the end of the process."""

from __future__ import annotations

import logging
import signal

import numpy as np
import pytest

import fluxmoe
from fluxmoe.core.paging.event import open_event
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.arbitration import ArbitrationView
from fluxmoe.core.policy.guards import ArbitrationGuard, EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import PageView
from fluxmoe.core.types import Access, Geometry
from fluxmoe.errors import PolicyFaultError

PAGES = np.arange(4)


class Odd(Exception):
    def __str__(self):
        raise RuntimeError("not even that")


class OddRepr:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.fixture
def view():
    return PageView(PageTable(Geometry(2, 4), [4]))


def guarded(view, score, **members):
    policy = type("Policy", (fluxmoe.EvictionPolicy,), {"score": score, **members})()
    return EvictionGuard(policy, view, name="p")


def raising(error):
    def score(self, view, pages):
        raise error

    return score


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), BaseException("sly"), Odd()])
def test_whatever_a_policy_raises_is_contained(view, error, caplog):
    guard = guarded(view, raising(error))
    with caplog.at_level(logging.WARNING):
        assert guard.choose(PAGES, 2).tolist() == [0, 1]  # LRU; ties are broken by page
    assert guard.faults == 1
    assert type(error).__name__ in caplog.text


def test_ctrl_c_gets_through(view):
    guard = guarded(view, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        guard.choose(PAGES, 1)
    assert guard.faults == 0


def test_what_a_signal_handler_raises_gets_through(view):
    class Stop:
        def handle(self, number, frame):
            raise SystemExit("asked to stop")

    def score(self, view, pages):
        signal.raise_signal(signal.SIGUSR1)
        return pages

    before = signal.signal(signal.SIGUSR1, Stop().handle)
    try:
        guard = guarded(view, score)
        with pytest.raises(SystemExit, match="asked to stop"):
            guard.choose(PAGES, 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert guard.faults == 0


def test_an_answer_that_cannot_be_printed_is_a_fault_like_any_other(view):
    guard = guarded(view, lambda self, view, pages: OddRepr())
    assert guard.choose(PAGES, 1).tolist() == [0]
    assert guard.faults == 1


def test_a_masked_array_is_taken_as_plain_numbers(view):
    masked = np.ma.masked_array([3.0, 1.0, 2.0, 4.0], [False, True, False, False])
    guard = guarded(view, lambda self, view, pages: masked)
    assert guard.choose(PAGES, 2).tolist() == [1, 2]
    assert guard.faults == 0


def test_a_declaration_is_read_once(view):
    class Fickle(fluxmoe.PrefetchPolicy):
        asked = 0

        @property
        def lead(self):
            self.asked += 1
            if self.asked > 1:
                raise OSError("gone")
            return 1

        def propose(self, view, access):
            return [5]

    guard = PrefetchGuard(Fickle(), view, name="p")
    access = Access(0, 0, PAGES[:1], np.zeros(1, bool), np.ones(1, np.int64))
    for _ in range(3):
        assert guard.active
        assert guard.propose(access).tolist() == [5]


@pytest.mark.parametrize("name", ["last_use", "event", "slots", "num_layers", "rng", "future", "x"])
def test_nothing_of_a_view_can_be_set_or_deleted(view, name):
    with pytest.raises(AttributeError, match="views are read-only"):
        setattr(view, name, None)
    with pytest.raises(AttributeError, match="views are read-only"):
        delattr(view, name)


@pytest.mark.parametrize("name", ["last_use", "use_count", "loaded_at"])
def test_the_arrays_of_a_view_stay_read_only(view, name):
    array = getattr(view, name)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    assert array.dtype == np.int64
    before = view._table.event
    open_event(view._table.directory, 0, 1, np.array([2]), np.zeros(0, np.int32))
    assert getattr(view, name)[6] == view._table.books._asdict()[name][6]  # updated nevertheless
    assert view.last_use[6] == before + 1


def test_make_kernel_that_exits_is_an_error_before_anything_runs(view):
    def make_kernel(self, view):
        raise SystemExit(1)

    with pytest.raises(PolicyFaultError, match="make_kernel raised SystemExit"):
        guarded(view, lambda *a: 0, make_kernel=make_kernel)


def test_an_arbitration_policy_can_write_to_nothing():
    seen = []

    class Writes(fluxmoe.ArbitrationPolicy):
        def split(self, view):
            seen.append(view)
            view.frames["kv"] = 0
            return fluxmoe.Split(view.frames)

    given = ArbitrationView({"experts": 3, "kv": 5}, 8)
    guard = ArbitrationGuard(Writes(), name="p")
    assert dict(guard.split(given).frames) == {"experts": 3, "kv": 5}
    assert guard.faults == 1
    assert not seen[0].experts.curve.flags.writeable
