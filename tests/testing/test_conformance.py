"""The conformance kit accepts correct policies and codecs, and finds every kind of fault."""

from __future__ import annotations

import importlib.util
import sys
import time

import numpy as np
import pytest

import fluxmoe
from fluxmoe import plugins
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.testing import (
    ConformanceError,
    check_arbitration_policy,
    check_eviction_policy,
    check_prefetch_policy,
)
from fluxmoe.testing.conformance import arbitration, eviction, prefetch
from tests.core.rig import HighestPages, Kernel, Quadratic, StableKernel
from tests.fuzz.policies import Falling, Fickle, Infinite, Queue, Wild

CHECKS = {
    "eviction": check_eviction_policy,
    "prefetch": check_prefetch_policy,
    "arbitration": check_arbitration_policy,
}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setenv("FLUXMOE_PLUGINS", "")
    return plugins.load()


@pytest.mark.parametrize("kind", CHECKS)
def test_all_built_in_policies_conform(registry, kind):
    for name in registry.names(kind):
        CHECKS[kind](lambda name=name: registry.create(kind, name))


@pytest.mark.parametrize(
    "policy",
    [Quadratic, Infinite, Falling, Fickle, HighestPages, Queue, Kernel, StableKernel],
)
def test_right_policies_of_every_form_conform(policy):
    check_eviction_policy(policy)


def test_a_right_prefetch_policy_may_propose_any_other_layer():
    class Anything(Wild):
        lead = 99

    check_prefetch_policy(Anything)


# --- faulty policies ------------------------------------------------------------------------------


class Eviction(fluxmoe.EvictionPolicy):
    """LRU, to be broken by tests."""

    def score(self, view, pages):
        return view.last_use[pages]


class Prefetch(fluxmoe.PrefetchPolicy):
    """A policy that fetches the first expert of the next layer, to be broken by tests."""

    def propose(self, view, access):
        layer = (access.layer + 1) % view.num_layers
        return [] if layer == access.layer else view.page_of(layer, [0])


class Arbitration(fluxmoe.ArbitrationPolicy):
    """A policy that keeps the current split, to be broken by tests."""

    def split(self, view):
        return fluxmoe.Split(view.frames)


def spoilt(base, **members):
    """Make a subclass with one fault."""
    return type("Spoilt", (base,), members)


def _score(answer):
    return lambda self, view, pages: answer(view, pages)


def _loop(*args):
    while True:
        pass


def _exit(*args):
    sys.exit(3)


def _set(view, pages):
    view.last_use = None
    return pages


def _write(view, pages):
    view.last_use[0] = 7
    return pages


def _force(self, view, access):
    access.tokens.flags.writeable = True
    access.tokens[0] += 1


def _spend(view):
    view.frames["kv"] = 0
    return fluxmoe.Split(view.frames)


def _none(self, view, access):
    return [False] * len(access.pages)


def _slow(self, view, pages):
    time.sleep(0.006)


class Moody(Eviction):
    """A policy whose scores depend on the number of calls to score."""

    calls = 0

    def score(self, view, pages):
        self.calls += 1
        return (view.last_use[pages] * self.calls) % 7


class Forgetful(Eviction):
    """A policy that keeps state across reset()."""

    def __init__(self):
        self.seen = 0

    def on_access(self, view, access):
        self.seen += 1

    def score(self, view, pages):
        return (pages * 7919 + self.seen // 64) % 101


class Shared(Forgetful):
    """A policy that keeps state in its class."""

    book: list[int] = []  # noqa: RUF012

    def __init__(self):
        self.book.clear()

    def reset(self):
        self.book.clear()

    def on_access(self, view, access):
        self.book.append(1)

    def score(self, view, pages):
        return (pages * 7919 + len(self.book) // 32) % 101


class Dice(Eviction):
    """A policy that uses the wrong random generator."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.seed = type(self).made

    def score(self, view, pages):
        return (pages * 7919 * self.seed) % 101


class TwoMinds(Eviction):
    """A policy whose scores differ between score and score_kernel."""

    @staticmethod
    def score_kernel(last_use, use_count, loaded_at, event, page):
        return float(use_count)

    def score(self, view, pages):
        return view.last_use[pages]


class NanKernel(fluxmoe.EvictionPolicy):
    @staticmethod
    def score_kernel(last_use, use_count, loaded_at, event, page):
        return (last_use - last_use) / (use_count - use_count)


class NoKernel(fluxmoe.EvictionPolicy):
    @staticmethod
    def score_kernel(last_use, use_count, loaded_at, event, page):
        return open("x").read()


ONE = Eviction()

EVICTION = [
    # made
    (lambda: 7, "made", "the factory made 7"),
    (lambda: ONE, "made", "the same object twice"),
    (_exit, "made", "SystemExit: 3"),
    (lambda: 1 / 0, "made", "ZeroDivisionError"),
    # declared
    (fluxmoe.EvictionPolicy, "declared", "neither score nor select"),
    (
        spoilt(Eviction, score=lambda self, pages: pages),
        "declared",
        "score(pages) cannot be called",
    ),
    (spoilt(Eviction, on_acces=lambda self, view, access: None), "declared", "on_acces is never"),
    (spoilt(Eviction, stable_score="yes"), "declared", "stable_score is 'yes'"),
    (spoilt(Eviction, retain=3), "declared", "retain is 3"),
    (spoilt(Eviction, score_kernel=lambda *a: 1.0), "declared", "score_kernel takes self"),
    # answers
    (spoilt(Eviction, score=_score(lambda v, p: 1 / 0)), "answers", "ZeroDivisionError"),
    (spoilt(Eviction, score=_score(_exit)), "answers", "SystemExit: 3"),
    (spoilt(Eviction, score=_score(_loop)), "answers", "more than 2 s"),
    (spoilt(Eviction, score=_score(lambda v, p: p[:-1])), "answers", "numbers"),
    (spoilt(Eviction, score=_score(lambda v, p: p[0])), "answers", "numbers"),
    (spoilt(Eviction, score=_score(lambda v, p: None)), "answers", "returned None"),
    (spoilt(Eviction, score=_score(lambda v, p: "high")), "answers", "numbers"),
    (spoilt(Eviction, score=_score(lambda v, p: [str(q) for q in p])), "answers", "numbers"),
    (spoilt(Eviction, score=_score(lambda v, p: p * np.nan)), "answers", "NaN"),
    (spoilt(Eviction, score=_score(lambda v, p: p > 3)), "answers", "bool"),
    (spoilt(Eviction, score=_score(lambda v, p: v.next_use[p])), "answers", "next_use is known"),
    (spoilt(Eviction, score=_score(_write)), "answers", "read-only"),
    (spoilt(Eviction, score=_score(_set)), "answers", "views are read-only"),
    (spoilt(Eviction, select=lambda s, v, p, n: p[: n + 1]), "answers", "pages"),
    (spoilt(Eviction, select=lambda s, v, p, n: [p[0]] * n), "answers", "a duplicate"),
    (spoilt(Eviction, select=lambda s, v, p, n: p[:n] + 0.5), "answers", "float64"),
    (spoilt(Eviction, retain=lambda s, v, a: [1] * len(a.pages)), "answers", "bools"),
    (spoilt(Eviction, retain=lambda s, v, a: [True]), "answers", "bools"),
    (spoilt(Eviction, on_access=lambda s, v, a: _loop()), "answers", "more than 2 s"),
    (spoilt(Eviction, on_load=lambda s, v, p: 1 / 0), "answers", "ZeroDivisionError"),
    (spoilt(Eviction, on_evict=lambda s, v, p: 1 / 0), "answers", "ZeroDivisionError"),
    (NanKernel, "answers", "NaN"),
    (NoKernel, "answers", "numba cannot compile"),
    # all other rules
    (spoilt(Eviction, on_access=_force), "looks only", "it changed access.tokens"),
    (Moody, "pure", "called twice in the same state"),
    (Dice, "repeats", "decide differently"),
    (Forgetful, "resets", "after reset()"),
    (Shared, "alone", "while another one"),
    (
        spoilt(Eviction, stable_score=True, score=lambda s, v, p: -v.last_use[p] + v.event % 3 * p),
        "stable",
        "neither accessed nor loaded",
    ),
    (TwoMinds, "agrees", ", but score_kernel"),
    (spoilt(Eviction, needs_future=True), "foresight", "never read"),
    (spoilt(Eviction, retain=_none, on_evict=_slow), "fast", "its fastest call took"),
]

PREFETCH = [
    (Eviction, "made", "the factory made"),
    (spoilt(Prefetch, propose=lambda self, view: []), "declared", "cannot be called"),
    (spoilt(Prefetch, lead=1.5), "declared", "lead is 1.5"),
    (spoilt(Prefetch, lead=-1), "declared", "lead is -1"),
    (spoilt(Prefetch, propose=lambda s, v, a: a.pages), "answers", "page of the current layer"),
    (spoilt(Prefetch, propose=lambda s, v, a: [-1]), "answers", "outside"),
    (spoilt(Prefetch, propose=lambda s, v, a: [0.5]), "answers", "not a list of pages"),
    (spoilt(Prefetch, propose=lambda s, v, a: None), "answers", "None"),
    (spoilt(Prefetch, propose=lambda s, v, a: a.predicted[:1]), "answers", "not subscriptable"),
    (spoilt(Prefetch, propose=lambda s, v, a: _loop()), "answers", "more than 2 s"),
    (Wild, "leads", "layers ahead, but lead is 1"),
]

ARBITRATION = [
    (Eviction, "made", "the factory made"),
    (spoilt(Arbitration, split=lambda self: None), "declared", "cannot be called"),
    (spoilt(Arbitration, fixed=1), "declared", "fixed is 1"),
    (spoilt(Arbitration, interval=0), "declared", "interval is 0"),
    (spoilt(Arbitration, calm_interval=None), "declared", "calm_interval is None"),
    (spoilt(Arbitration, split=lambda s, v: dict(v.frames)), "answers", "not a Split"),
    (spoilt(Arbitration, split=lambda s, v: None), "answers", "None"),
    (
        spoilt(Arbitration, split=lambda s, v: fluxmoe.Split({"kv": 1})),
        "answers",
        "not for ['experts', 'kv']",
    ),
    (
        spoilt(Arbitration, split=lambda s, v: fluxmoe.Split(dict.fromkeys(v.frames, 0.5))),
        "answers",
        "0.5 frames",
    ),
    (
        spoilt(Arbitration, split=lambda s, v: fluxmoe.Split(dict.fromkeys(v.frames, 9999))),
        "answers",
        "frames, but there are",
    ),
    (spoilt(Arbitration, split=lambda s, v: 1 / v.step_seconds), "answers", "ZeroDivisionError"),
    (spoilt(Arbitration, split=lambda s, v: _spend(v)), "answers", "item assignment"),
]


@pytest.mark.parametrize(
    ("kind", "factory", "rule", "message"),
    [
        *(("eviction", *case) for case in EVICTION),
        *(("prefetch", *case) for case in PREFETCH),
        *(("arbitration", *case) for case in ARBITRATION),
    ],
)
def test_what_is_wrong_is_found_and_told(kind, factory, rule, message):
    with pytest.raises(ConformanceError) as info:
        CHECKS[kind](factory)
    broken = {finding.rule: finding for finding in info.value.findings}
    assert rule in broken
    assert message in broken[rule].detail
    text = str(info.value)
    assert text.startswith(f"an {kind}" if kind[0] in "ae" else f"a {kind}")
    assert f"broken rule: {rule} (" in text
    assert "found:" in text
    assert isinstance(info.value, AssertionError)


def test_every_rule_is_broken_by_a_test():
    broken = {
        "eviction": {case[1] for case in EVICTION},
        "prefetch": {case[1] for case in PREFETCH},
        "arbitration": {case[1] for case in ARBITRATION},
    }
    rules = {m.__name__.rpartition(".")[2]: m.RULES for m in (eviction, prefetch, arbitration)}
    common = {"looks only", "repeats", "resets", "alone", "fast"}  # tested with eviction policies
    for kind, known in rules.items():
        assert {rule.name for rule in known} - broken[kind] <= (
            set() if kind == "eviction" else common
        )


def test_the_common_rules_hold_for_arbitration_too():
    class Drift(Arbitration):
        day = 0

        def split(self, view):
            self.day += 1
            if self.day < 3 or sum(view.frames.values()) > view.total_frames:
                return fluxmoe.Split(view.frames)
            experts = view.total_frames - self.day % 2
            return fluxmoe.Split({"experts": experts, "kv": view.total_frames - experts})

    with pytest.raises(ConformanceError, match=r"resets .*\n(.*\n)*.* frames for KV, then .* step"):
        check_arbitration_policy(Drift)


def test_after_a_broken_essential_rule_the_rest_is_not_tried():
    status = [finding.status for finding in eviction.findings(lambda: 1 / 0)]
    assert status == ["broken", *["not tried"] * (len(status) - 1)]


def test_what_does_not_apply_says_why():
    found = {f.rule: f for f in eviction.findings(LeastRecentlyUsed)}
    assert found["stable"].status == "kept"
    assert (found["foresight"].status, found["foresight"].detail) == (
        "does not apply",
        "needs_future is False",
    )


def test_the_policies_own_randomness_must_come_from_the_view():
    class Fair(Eviction):
        def score(self, view, pages):
            return view.rng.random(len(pages))

    check_eviction_policy(Fair)

    class Unfair(Eviction):
        def score(self, view, pages):
            return np.random.random(len(pages))

    with pytest.raises(ConformanceError, match=r"only view\.rng"):
        check_eviction_policy(Unfair)


# --- codecs ---------------------------------------------------------------------------------------


class Plain(fluxmoe.Codec):
    """A codec that stores the size and the unchanged bytes, to be broken by tests."""

    def encode(self, raw):
        return np.concatenate([np.frombuffer(np.int64(len(raw)).tobytes(), np.uint8), raw])

    def decode(self, coded, out):
        if len(coded) != len(out) + 8 or int(coded[:8].view(np.int64)[0]) != len(out):
            raise fluxmoe.CodecError("another size")
        out[:] = coded[8:]


def _far(self, coded, out):
    Plain.decode(self, coded, out)
    np.frombuffer(out.base, np.uint8)[-1] = 0


class OneByOne(Plain):
    """A codec that keeps its working data in self."""

    def encode(self, raw):
        self.raw = raw
        time.sleep(0.0005)
        return super().encode(self.raw)


class Random(Plain):
    def encode(self, raw):
        coded = super().encode(raw)
        return np.append(coded, np.uint8(id(self) >> 4 & 255))

    def decode(self, coded, out):
        super().decode(coded[:-1], out)


CODEC = [
    (Eviction, "made", "the factory made"),
    (lambda: 1 / 0, "made", "ZeroDivisionError"),
    (spoilt(Plain, decode=lambda self, coded: None), "declared", "cannot be called"),
    (spoilt(Plain, encode=lambda s, raw: bytes(raw)), "lossless", "it returned b''"),
    (spoilt(Plain, encode=lambda s, raw: raw[: len(raw)]), "lossless", "a view of `raw`"),
    (spoilt(Plain, encode=lambda s, raw: raw.sort()), "lossless", "read-only"),
    (spoilt(Plain, decode=lambda s, coded, out: out.fill(0)), "lossless", "was restored as"),
    (spoilt(Plain, decode=lambda s, coded, out: coded), "lossless", "it returned array"),
    (spoilt(Plain, decode=_far), "lossless", "it wrote beyond `out`"),
    (Random, "repeats", "encode it differently"),
    (
        spoilt(Plain, decode=lambda s, c, o: o.__setitem__(slice(None), np.resize(c[8:], len(o)))),
        "refuses",
        "it was decoded",
    ),
    (
        spoilt(Plain, decode=lambda s, c, o: o.__setitem__(slice(None), c[8:])),
        "refuses",
        "ValueError",
    ),
    (
        spoilt(
            Plain,
            decode=lambda s, c, o: Plain.decode(s, c, o) if c[7] == 0 else _exit(),
        ),
        "survives",
        "SystemExit",
    ),
    (OneByOne, "shared", ""),
]


def test_codecs_that_are_right(registry):
    from fluxmoe.testing import check_codec

    check_codec(Plain)
    for name in registry.names("codec"):
        if name != "zipnn" or importlib.util.find_spec("zipnn"):
            check_codec(lambda name=name: registry.create("codec", name))
    check_codec(spoilt(Plain, encode=lambda s, raw: raw[:0].copy()))  # encoding never helps


@pytest.mark.parametrize(("factory", "rule", "message"), CODEC)
def test_what_is_wrong_with_a_codec_is_found(factory, rule, message):
    from fluxmoe.testing import check_codec

    with pytest.raises(ConformanceError) as info:
        check_codec(factory)
    broken = {finding.rule: finding for finding in info.value.findings}
    assert rule in broken
    assert message in broken[rule].detail
