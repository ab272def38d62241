"""A plugin for tests: policies that fail in the method and in the way given by their options."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from pydantic import BaseModel

import fluxmoe

EVICTION = ("score", "select", "retain", "on_access", "on_load", "on_evict", "reset")
HOOKS = ("on_access", "on_load", "on_evict", "reset")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even that")


class Sly(BaseException):
    """An error that is not an Exception, so that `except Exception` does not catch it."""


def _raise(*args):
    raise ValueError("planned")


def _unprintable(*args):
    raise Unprintable


def _sly(*args):
    raise Sly


def _exit(*args):
    sys.exit(1)


def _loop(*args):
    while not args[0].looped:
        args[0].again()
    raise ValueError("looped before")


def _write_item(self, view, *args):
    (view.last_use if args == () or not isinstance(args[0], np.ndarray) else args[0])[0] = 7


def _write_flag(self, view, *args):
    view.last_use.flags.writeable = True


def _set(self, view, *args):
    view.last_use = view.slots = None


def _delete(self, view, *args):
    del view.rng


def _answer(value):
    return lambda *args: value


#: Possible faults in a hook, and in a method that returns an answer.
IN_A_HOOK = {
    "raise": _raise,
    "unprintable": _unprintable,
    "sly": _sly,
    "exit": _exit,
    "loop": _loop,
    "write": _write_item,
    "flag": _write_flag,
    "set": _set,
    "delete": _delete,
}
IN_AN_ANSWER = {
    **IN_A_HOOK,
    "none": _answer(None),
    "text": _answer("nonsense"),
    "object": _answer(object()),
    "ragged": _answer([[1], [2, 3]]),
    "nan": _answer(np.full(3, np.nan)),
    "complex": lambda *args: np.zeros(3, np.complex128),
    "too many": lambda *args: np.zeros(10_000),
    "too far": lambda *args: np.full(4, 10**12),
    "generator": lambda *args: (x for x in range(3)),
}


class Options(BaseModel):
    method: str
    fault: str


def _faulty(base: type, method: str, fault: str) -> Any:
    fail = IN_AN_ANSWER[fault]

    class Faulty(base):  # type: ignore[misc]
        looped = False

        def again(self) -> None:
            pass

    def call(self, *args):
        try:
            return fail(self, *args)
        finally:
            if fault == "loop":
                type(self).looped = True  # loops only once, because each loop takes two seconds

    setattr(Faulty, method, call)
    return Faulty()


def eviction(method: str, fault: str) -> fluxmoe.EvictionPolicy:
    class Base(fluxmoe.EvictionPolicy):
        def score(self, view, pages):
            return view.last_use[pages]

    return _faulty(Base, method, fault)  # type: ignore[no-any-return]


def prefetch(method: str, fault: str) -> fluxmoe.PrefetchPolicy:
    class Base(fluxmoe.PrefetchPolicy):
        def propose(self, view, access):
            return []

    return _faulty(Base, method, fault)  # type: ignore[no-any-return]


class Everything(fluxmoe.EvictionPolicy):
    """A policy that fails in every method, in a different way each time."""

    def __init__(self) -> None:
        self._calls = 0
        self.looped = False

    def again(self) -> None:
        pass

    def _fail(self, faults, *args):
        self._calls += 1
        kind = [*faults][self._calls % len(faults)]
        try:
            return faults[kind](self, *args)
        finally:
            self.looped = self.looped or kind == "loop"

    def score(self, view, pages):
        return self._fail(IN_AN_ANSWER, view, pages)

    def retain(self, view, access):
        return self._fail(IN_AN_ANSWER, view, access)

    def on_access(self, view, access):
        self._fail(IN_A_HOOK, view, access)

    def on_load(self, view, pages):
        self._fail(IN_A_HOOK, view, pages)

    def on_evict(self, view, pages):
        self._fail(IN_A_HOOK, view, pages)

    def reset(self):
        raise ValueError("planned")


class FetchesNonsense(fluxmoe.PrefetchPolicy):
    """A policy that fails in the same ways instead of proposing pages."""

    def __init__(self) -> None:
        self._everything = Everything()

    def propose(self, view, access):
        return self._everything.retain(view, access)


class SplitsNonsense(fluxmoe.ArbitrationPolicy):
    """A policy that raises, exits, returns nonsense and writes to its input."""

    def split(self, view):
        kind = view.step % 6
        if kind == 0:
            view.frames["kv"] = 0
        if kind == 1:
            view.experts.curve[:] = 0
        if kind == 2:
            sys.exit(1)
        if kind == 3:
            return fluxmoe.Split({"experts": -1, "kv": 10**12})
        if kind == 4:
            return fluxmoe.Split(None)  # type: ignore[arg-type]
        return "half and half"


@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("faulty", eviction, Options)
    register("faulty", prefetch, Options)
    register("everything", Everything)
    register("fetches-nonsense", FetchesNonsense)
    register("splits-nonsense", SplitsNonsense)
