"""E9: each answer of a policy is read once into plain values and then validated; nothing escapes.

Escapes are exceptions that leave a guard, policy code that runs without a time limit, and answers
that change after validation.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

import fluxmoe
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.arbitration import ArbitrationView, Split
from fluxmoe.core.policy.guards import ArbitrationGuard, EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import PageView
from fluxmoe.core.policy.watchdog import Limits
from fluxmoe.core.types import Access, Geometry
from fluxmoe.errors import PolicyFaultError
from tests.core.rig import rule_for

LAYERS, E, SLOTS = 4, 6, 9
PAGES = np.arange(6, 12)
LIMITS = Limits(hard_s=0.1)
VIEW = ArbitrationView({"experts": 60, "kv": 40}, 100)
ACCESS = Access(0, 0, PAGES[:2] - 6, np.zeros(2, bool), np.ones(2, np.int64))


def for_ever(*_):
    while True:
        pass


def leaves(*_):
    sys.exit("planned")


def fails(*_):
    raise ZeroDivisionError("planned")


def evictor(limits=LIMITS, **members) -> EvictionGuard:
    policy = type("Policy", (fluxmoe.EvictionPolicy,), members)()
    return EvictionGuard(
        policy, PageView(PageTable(Geometry(LAYERS, E), [SLOTS])), name="p", limits=limits
    )


def fetcher(answer, **members) -> PrefetchGuard:
    cls = type("P", (fluxmoe.PrefetchPolicy,), {"propose": lambda self, *_: answer(), **members})
    return PrefetchGuard(
        cls(), PageView(PageTable(Geometry(LAYERS, E), [SLOTS])), name="p", limits=LIMITS
    )


def arbiter(answer, **members) -> ArbitrationGuard:
    cls = type("P", (fluxmoe.ArbitrationPolicy,), {"split": lambda self, view: answer(), **members})
    return ArbitrationGuard(cls(), name="p", limits=LIMITS)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">i8", ">i2", ">u4", ">f2", "g"])
@pytest.mark.parametrize("stable", [False, True], ids=["scored", "ordered"])
def test_e9_scores_of_any_byte_order(dtype, stable):
    def score(self, view, pages):
        return (-pages).astype(dtype) if "u" not in dtype else (100 - pages).astype(dtype)

    policy = type("P", (fluxmoe.EvictionPolicy,), {"score": score, "stable_score": stable})()
    rule = rule_for(PageTable(Geometry(LAYERS, E), [SLOTS]), policy, strict=True)
    rule.run(0, 0, np.arange(E))
    rule.run(0, 1, np.arange(E))
    assert np.flatnonzero(rule.table.resident).tolist() == [0, 1, 2, *range(6, 12)]


@pytest.mark.parametrize("dtype", [">i8", ">u2"])
def test_e9_pages_of_any_byte_order(dtype):
    guard = evictor(select=lambda self, view, pages, n: pages[:n].astype(dtype))
    assert guard.choose(PAGES, 2).tolist() == [6, 7]
    assert fetcher(lambda: np.array([7, 20], dtype)).propose(ACCESS).tolist() == [7, 20]


class Strided(np.ndarray):
    """An array subclass with methods written by the policy."""

    __getitem__ = astype = min = __floordiv__ = fails


ODD_ARRAYS = {
    "a subclass": lambda: np.arange(6.0).view(Strided),
    "every other": lambda: np.arange(12.0)[::2],
    "backwards": lambda: np.arange(6.0)[::-1][::-1],
    "read-only": lambda: np.broadcast_to(np.float64(3), 6),
    "unaligned": lambda: np.frombuffer(bytes(49), np.uint8)[1:].view(np.float64),
}


@pytest.mark.parametrize("answer", ODD_ARRAYS.values(), ids=ODD_ARRAYS)
def test_e9_arrays_of_any_kind_are_plain_numbers(answer):
    guard = evictor(score=lambda self, view, pages: answer())
    assert guard.choose(PAGES, 2).tolist() == [6, 7]
    assert guard.faults == 0


class Number(int):
    """An int with methods written by the policy."""

    __add__ = __radd__ = __lt__ = __gt__ = __ge__ = __int__ = __index__ = fails
    __repr__ = __str__ = leaves


def test_e9_numbers_of_a_class_are_the_numbers():
    split = arbiter(lambda: Split({"experts": Number(70), "kv": Number(30)})).split(VIEW)
    assert dict(split.frames) == {"experts": 70, "kv": 30}
    assert {type(count) for count in split.frames.values()} == {int}
    guard = arbiter(lambda: None, interval=Number(5), calm_interval=Number(50))
    assert [type(guard.interval), type(guard.calm_interval)] == [int, int]
    assert (guard.interval, guard.calm_interval) == (5, 50)


@pytest.mark.parametrize(
    "counts",
    [
        (np.uint8(200), np.uint8(100)),
        (np.int64(2**63 - 1), np.int64(2**63 - 1)),
        (10**5000, 0),
        (Number(10**5000), 0),
        (-1, 50),
        (Number(-1), 50),
        (True, 50),
        (np.True_, 50),
        (1.0, 50),
        (np.array([3]), 50),
        (float("nan"), 50),
    ],
    ids=range(11),
)
def test_e9_splits_that_are_too_much_or_no_numbers(counts, caplog):
    guard = arbiter(lambda: Split(dict(zip(("experts", "kv"), counts, strict=True))))
    with caplog.at_level(logging.WARNING):
        assert guard.split(VIEW).frames == VIEW.frames
    assert guard.faults == 1


# --- answers with behaviour ----------------------------------------------------------------------


def test_e9_an_answer_that_changes_after_it_was_judged():
    """A policy may keep the array that it returned, and write to it from a thread."""
    kept = {}

    def select(self, view, pages, n):
        kept["victims"] = pages[:n].copy()
        return kept["victims"]

    def propose(self, view, access):
        kept["pages"] = np.array([7, 20])
        return kept["pages"]

    chosen = evictor(select=select).choose(PAGES, 2)
    policy = type("P", (fluxmoe.PrefetchPolicy,), {"propose": propose})()
    view = PageView(PageTable(Geometry(LAYERS, E), [SLOTS]))
    proposed = PrefetchGuard(policy, view, name="p").propose(ACCESS)
    for array in kept.values():
        array[...] = 10**9
    assert (chosen.tolist(), proposed.tolist()) == ([6, 7], [7, 20])


class Alive(Sequence):
    """A sequence, one method of which is given by the test."""

    def __init__(self, values, **does):
        self.values, self.does = values, does

    def _do(self, name):
        if name in self.does:
            self.does[name]()

    def __len__(self):
        self._do("len")
        return len(self.values)

    def __getitem__(self, at):
        self._do("item")
        return self.values[at]

    def __repr__(self):
        self._do("repr")
        return "alive"


class Frames(Mapping):
    """A mapping, one method of which is given by the test."""

    def __init__(self, **does):
        self.does = does

    def _do(self, name):
        if name in self.does:
            self.does[name]()

    def __getitem__(self, name):
        self._do("item")
        return {"experts": 70, "kv": 30}[name]

    def __iter__(self):
        self._do("iter")
        return iter(("experts", "kv"))

    def __len__(self):
        self._do("len")
        return 2


class Bad(Split):
    """A split with a property."""

    def __init__(self, does):
        object.__setattr__(self, "does", does)

    @property
    def frames(self):
        self.does()
        return {"experts": 70, "kv": 30}


DOES = {"raises": fails, "exits": leaves, "never ends": for_ever}


@pytest.mark.parametrize("does", DOES.values(), ids=DOES)
@pytest.mark.parametrize("method", ["len", "item"])
def test_e9_sequences_run_within_the_call(method, does):
    guard = evictor(score=lambda self, view, pages: Alive([1.0] * len(pages), **{method: does}))
    assert guard.choose(PAGES, 1).tolist() == [6]
    assert guard.faults == 1
    guard = fetcher(lambda: Alive([7, 8], **{method: does}))
    assert guard.propose(ACCESS).tolist() == []
    assert guard.faults == 1


@pytest.mark.parametrize("does", DOES.values(), ids=DOES)
@pytest.mark.parametrize("method", ["iter", "item"])
def test_e9_mappings_run_within_the_call(method, does):
    guard = arbiter(lambda: Split(Frames(**{method: does})))
    assert guard.split(VIEW).frames == VIEW.frames
    assert guard.faults == 1
    assert dict(arbiter(lambda: Split(Frames())).split(VIEW).frames) == {"experts": 70, "kv": 30}


@pytest.mark.parametrize("does", DOES.values(), ids=DOES)
def test_e9_properties_run_within_the_call(does):
    guard = arbiter(lambda: Bad(does))
    assert guard.split(VIEW).frames == VIEW.frames
    assert guard.faults == 1


@pytest.mark.parametrize("does", DOES.values(), ids=DOES)
def test_e9_methods_that_are_properties_run_within_the_call(does):
    guard = evictor(score=property(does), on_load=property(does), reset=property(does))
    guard.reset()
    guard.on_load(PAGES)
    assert guard.choose(PAGES, 1).tolist() == [6]
    assert guard.faults == 3


@pytest.mark.parametrize("does", DOES.values(), ids=DOES)
def test_e9_declarations_are_read_within_a_call(does):
    assert not evictor(score=lambda *_: 0, stable_score=property(does)).stable
    guard = fetcher(lambda: [7], lead=property(does))
    assert (guard.active, guard.faults) == (False, 1)
    guard = arbiter(lambda: None, interval=property(does), fixed=property(does))
    assert (guard.interval, guard.fixed, guard.faults) == (1, False, 2)


@pytest.mark.parametrize("does", DOES.values(), ids=DOES)
def test_e9_printing_runs_within_the_call(does, caplog):
    class Says:
        def __repr__(self):
            does()

        __str__ = __repr__

    class Error(Exception):
        __str__ = __repr__ = Says.__repr__

    def raises(*_):
        raise Error

    with caplog.at_level(logging.WARNING):
        for guard in (arbiter(Says), arbiter(raises), arbiter(lambda: Split({"x": Says()}))):
            assert guard.split(VIEW).frames == VIEW.frames
            assert guard.faults == 1
        guard = evictor(score=lambda *_: Says())
        assert guard.choose(PAGES, 1).tolist() == [6]
        assert guard.faults == 1


class Sly(Exception):
    """An exception whose attributes raise."""

    @property
    def __class__(self):
        raise ZeroDivisionError("planned")

    @property
    def __traceback__(self):
        raise ZeroDivisionError("planned")


@pytest.mark.parametrize("strict", [False, True])
def test_e9_exceptions_whose_attributes_raise(strict):
    def score(*_):
        raise Sly

    policy = type("P", (fluxmoe.EvictionPolicy,), {"score": score})()
    view = PageView(PageTable(Geometry(LAYERS, E), [SLOTS]))
    guard = EvictionGuard(policy, view, name="p", strict=strict)
    if strict:
        with pytest.raises(PolicyFaultError, match="raised Sly"):
            guard.choose(PAGES, 1)
    else:
        assert guard.choose(PAGES, 1).tolist() == [6]
        assert guard.faults == 1


def test_e9_make_kernel_runs_within_a_call():
    class Error(Exception):
        __str__ = for_ever

    def raises(*_):
        raise Error

    with pytest.raises(PolicyFaultError, match="make_kernel took more than 2 s"):
        evictor(make_kernel=raises)


def test_e9_the_end_of_an_answer_is_part_of_the_call():
    """The code that an object runs when it is dropped takes time as well."""
    spent = []

    class Slow(Alive):
        def __del__(self):
            begun = time.thread_time()
            while time.thread_time() - begun < 0.02:
                pass
            spent.append(True)

    guard = evictor(limits=Limits(soft_s=0.01), score=lambda self, view, pages: Slow([1.0] * 6))
    for _ in range(2):  # measurement begins after a late call, which does not count
        assert guard.choose(PAGES, 1).tolist() == [6]
    assert spent == [True, True]
    assert guard.slow == 1


# --- sizes of answers ----------------------------------------------------------------------------


class Reads(Alive):
    """A sequence that counts how often it is read."""

    reads = 0

    def _do(self, name):
        self.reads += name == "item"


def test_e9_answers_that_are_too_long_are_not_read(caplog):
    many = Reads(range(10**6))
    with caplog.at_level(logging.WARNING):
        assert fetcher(lambda: many).propose(ACCESS).tolist() == []
        assert evictor(score=lambda *_: many).choose(PAGES, 1).tolist() == [6]
        assert evictor(select=lambda *_: many).choose(PAGES, 1).tolist() == [6]
    assert many.reads == 0
    for said in caplog.messages:
        assert "returned 1000000 values" in said


def test_e9_an_array_that_is_too_long_is_not_copied():
    endless = np.broadcast_to(np.int64(7), 2**50)  # takes eight bytes
    guard = fetcher(lambda: endless)
    assert guard.propose(ACCESS).tolist() == []
    assert guard.faults == 1
    assert fetcher(lambda: [7, 8] * 12).propose(ACCESS).tolist() == [7, 8]  # each page at most once


def test_e9_a_mapping_without_end_is_not_read_to_its_end():
    class Endless(Frames):
        def __iter__(self):
            while True:
                yield "experts"

    guard = arbiter(lambda: Split(Endless()))
    assert guard.split(VIEW).frames == VIEW.frames
    assert guard.faults == 1


# --- the stopwatch -------------------------------------------------------------------------------


def test_e9_an_interrupt_that_native_code_turns_into_its_own_error_is_told(caplog):
    """An interrupt in a callback of native code surfaces as the error that the code raises."""

    def score(self, view, pages):
        try:
            for_ever()
        except BaseException:
            raise RuntimeError("no compiled object yet for <Library 'scores'>") from None

    with caplog.at_level(logging.WARNING):
        assert evictor(score=score).choose(PAGES, 1).tolist() == [6]
    assert "score took more than 0.1 s" in caplog.messages[0]
