"""Text of policies and plugins: printable, short, on one line, and valid UTF-8 when sent."""

from __future__ import annotations

import json
import logging
import sys
from itertools import count
from types import ModuleType

import numpy as np
import pytest

import fluxmoe
from fluxmoe.core.arbitration.messages import Order, SetSlots
from fluxmoe.core.arbitration.moves import MoveWorker
from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split
from fluxmoe.core.policy.faults import PolicyCaller
from fluxmoe.core.policy.guards import ArbitrationGuard
from fluxmoe.core.policy.watchdog import DEFAULT_LIMITS
from fluxmoe.core.transfer.store import read
from fluxmoe.errors import CodecError, ConfigError, PluginLoadError, PolicyFaultError, StoreError
from fluxmoe.plugins.registry import Registry
from fluxmoe.stores.codec.base import Codec
from fluxmoe.stores.coding import Coder
from fluxmoe.testing.conformance.report import Broken
from fluxmoe.words import LIMIT, line, raised

NASTY = "one\ntwo\r\x1b[2J \ud800 \u202e\x00 " + "x" * 1_000_000


class Text(str):
    """A str with overridden methods."""

    __slots__ = ()

    def __str__(self) -> str:
        sys.exit("planned")

    isprintable = split = encode = __len__ = __getitem__ = __contains__ = __str__  # type: ignore[assignment]


class Mute(Exception):
    """An exception that cannot be converted to text."""

    def __str__(self) -> str:
        sys.exit("planned")

    __repr__ = __str__


class NamelessKind(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ValueError("planned")


class Nameless(Exception, metaclass=NamelessKind):
    __str__ = Mute.__str__


def fit(text: str, limit: int = LIMIT) -> bool:
    """Return True if text is valid in logs, labels, JSON and terminals."""
    text.encode()
    return type(text) is str and len(text) <= limit and text.isprintable()


@pytest.mark.parametrize(
    ("value", "how", "said"),
    [
        ("", str, ""),
        ("plain text, 12 → 13 MiB", str, "plain text, 12 → 13 MiB"),
        ("two\nlines\tand\u2028more", str, "two lines and more"),
        ("a\ud800b\x1b\u202e", str, "a\\ud800b\\x1b\\u202e"),
        ("x" * LIMIT, str, "x" * LIMIT),
        ("x" * (LIMIT + 1), str, "x" * (LIMIT - 1) + "…"),
        ("\ud800" * 10**6, str, ("\\ud800" * LIMIT)[: LIMIT - 1] + "…"),
        ("\n" * 10**6, str, "…"),
        (Text("as it is"), str, "as it is"),
        (Text("as it is"), repr, "'as it is'"),
        (Mute(), str, "a Mute that cannot be printed"),
        (Mute(), repr, "a Mute that cannot be printed"),
        (10**5000, repr, "a int that cannot be printed"),
        (7, lambda value: value, "a int that cannot be printed"),
        (None, str, "None"),
    ],
    ids=count(),
)
def test_lines(value, how, said):
    assert line(value, how) == said
    assert fit(line(value, how))


def test_exceptions():
    assert raised(ValueError("so\nit is")) == "ValueError: so it is"
    assert raised(Mute()) == "Mute: a Mute that cannot be printed"
    assert raised(Nameless()) == "Nameless: a Nameless that cannot be printed"
    assert fit(raised(type("N" * 10**6, (Exception,), {})(NASTY)))


def test_ctrl_c_gets_through():
    class Slow:
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        line(Slow())


class Says(ArbitrationPolicy):
    def __init__(self, answer) -> None:
        self.answer = answer

    def split(self, view):
        return self.answer(view)


VIEW = ArbitrationView({"experts": 6, "kv": 4}, 10)


@pytest.mark.parametrize("reason", [NASTY, Text(NASTY), "\ud800", "a\nb"], ids=count())
@pytest.mark.parametrize("frames", [{"experts": 5, "kv": 5}, None])
def test_the_reason_of_a_split(reason, frames):
    guard = ArbitrationGuard(Says(lambda view: Split(frames or view.frames, reason)), name="odd")
    split = guard.split(VIEW)
    assert guard.faults == 0
    assert split.frames == (frames or VIEW.frames)
    assert split.reason and fit(split.reason)


class Odd:
    def __repr__(self) -> str:
        sys.exit("planned")

    __str__ = __repr__


@pytest.mark.parametrize(
    "answer",
    [
        lambda view: NASTY,
        lambda view: Odd(),
        lambda view: Split({"experts": 5, "kv": 5}, Odd()),
        lambda view: Split({"experts": Odd(), "kv": 5}),
        lambda view: Split({NASTY: 1, "kv": 5}),
        lambda view: Split({Odd(): 1, "kv": 5}),
        lambda view: Split({"experts": 10**5000, "kv": 5}),
    ],
)
def test_a_wrong_split(answer, caplog):
    guard = ArbitrationGuard(Says(answer), name="odd")
    with caplog.at_level(logging.WARNING):
        assert guard.split(VIEW).frames == VIEW.frames
    assert guard.faults == 1
    assert all(fit(record.getMessage(), 3 * LIMIT) for record in caplog.records)
    with pytest.raises(PolicyFaultError) as caught:
        ArbitrationGuard(Says(answer), name="odd", strict=True).split(VIEW)
    assert fit(str(caught.value), 3 * LIMIT)


@pytest.mark.parametrize("error", [ValueError(NASTY), Mute(), Nameless()])
def test_what_a_policy_raises(error, caplog):
    class Odd:
        def score(self):
            raise error

    with caplog.at_level(logging.WARNING):
        PolicyCaller(Odd(), "eviction", "odd", strict=False, limits=DEFAULT_LIMITS).contain("score")
    assert fit(caplog.records[0].getMessage(), 3 * LIMIT)
    with pytest.raises(PolicyFaultError) as caught:
        PolicyCaller(Odd(), "eviction", "odd", strict=True, limits=DEFAULT_LIMITS).contain("score")
    assert fit(str(caught.value), 3 * LIMIT)


class Evicts(fluxmoe.EvictionPolicy):
    def score(self, view, pages):
        return pages


def evicts() -> Evicts:
    return Evicts()


evicts.__doc__ = NASTY[8:]  # a class statement could not set such text


def plugin(hook) -> ModuleType:
    module = ModuleType("odd")
    module.fluxmoe_register_policies = fluxmoe.hookimpl(hook, specname="fluxmoe_register_policies")
    return module


def refused(hook) -> str:
    with pytest.raises(PluginLoadError) as caught:
        Registry().add(plugin(hook), "odd")
    return str(caught.value)


@pytest.mark.parametrize(
    "name", [NASTY, "\ud800", "two\nlines", Text("text"), "", None, Odd()], ids=count()
)
def test_names_of_policies(name):
    said = refused(lambda register: register(name, Evicts))
    assert "not a valid name" in said and fit(said, 2 * LIMIT)


def test_what_plugins_say_when_they_are_loaded():
    def fails(register):
        raise ValueError(NASTY)

    class Kind(type):
        def __repr__(cls) -> str:
            return NASTY

    class Decides(metaclass=Kind):
        pass

    assert fit(refused(fails), 2 * LIMIT)
    assert fit(refused(lambda register: register("odd", Decides)), 3 * LIMIT)


@pytest.mark.parametrize(("value", "said"), [("two\nlines", NASTY), ("\ud800", ""), ("", "\ud800")])
def test_summaries_and_options(value, said):
    from pydantic import BaseModel, field_validator

    class Options(BaseModel):
        n: str = ""

        @field_validator("n")
        @classmethod
        def _never(cls, value: str) -> str:
            raise ValueError(said)

    registry = Registry()
    registry.add(plugin(lambda register: register("odd", evicts, Options)), "odd")
    assert fit(registry.get("eviction", "odd").summary)
    with pytest.raises(ConfigError) as caught:
        registry.create("eviction", {"kind": "odd", "n": value})
    assert fit(str(caught.value), 2 * LIMIT)


def test_codecs_and_stores(caplog):
    class Fails(Codec):
        def encode(self, raw):
            raise ValueError(NASTY)

        decode = encode  # type: ignore[assignment]

    raw = np.zeros(8, np.uint8)
    with caplog.at_level(logging.WARNING):
        assert Coder(Fails(), "odd").encode(raw) is raw
    assert fit(caplog.records[0].getMessage(), 2 * LIMIT)
    with pytest.raises(CodecError) as caught:
        Coder(Fails(), "odd", strict=True).encode(raw)
    assert fit(str(caught.value), 2 * LIMIT)

    class Store:
        def read_into(self, page, parts):
            raise ValueError(NASTY)

    with pytest.raises(StoreError) as unread:
        read(Store(), 0, [])
    assert fit(str(unread.value), 2 * LIMIT)


def test_the_worker_answers_with_a_line():
    class Pager:
        def resize_all(self, slots):
            raise ValueError(NASTY)

    answer = MoveWorker(0, None, Pager(), lambda: 0.0).receive(Order(1, SetSlots((1,))))
    assert answer is not None and fit(answer.problem)


def test_findings_of_the_conformance_kit():
    broken = Broken(NASTY, call=NASTY, mend=NASTY)
    assert all(map(fit, (broken.found, broken.call, broken.mend)))
    json.dumps(broken.found, ensure_ascii=False).encode()
