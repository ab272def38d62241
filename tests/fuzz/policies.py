"""The fuzzer's policies, and the order of each in plain Python.

In addition to the policies of other tests, there are scores that fall, tie or are infinite, lists
instead of arrays, a queue, random releases, random proposals, and a faulty variant of each policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import fluxmoe
from fluxmoe.policies.eviction.immediate import Immediate
from fluxmoe.policies.eviction.lfru import LeastFrequentlyRecentlyUsed
from fluxmoe.policies.eviction.lfu import LeastFrequentlyUsed
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.policies.eviction.next_use import NextUse
from tests.core import reference
from tests.core.reference import Reference, lfu, lru
from tests.core.rig import HighestPages, Kernel, Quadratic, StableKernel


class Falling(fluxmoe.EvictionPolicy):
    """A stable policy in which an access may lower a score; its few values cause many ties."""

    stable_score = True

    def score(self, view, pages):
        return ((view.last_use[pages] * 37 + view.use_count[pages] * 11) % 17).astype(np.uint8)


def falling(r: Reference, page: int) -> float:
    return (lru(r, page) * 37 + lfu(r, page) * 11) % 17


class Infinite(fluxmoe.EvictionPolicy):
    """A policy in plain Python that returns a list of floats, two thirds of which are infinite."""

    def score(self, view, pages):
        return [infinite_score(view.event, page) for page in pages.tolist()]


def infinite_score(event: int, page: int) -> float:
    return [float("inf"), float("-inf"), float(event % (page + 1))][(page + event // 16) % 3]


def infinite(r: Reference, page: int) -> float:
    return infinite_score(r.now, page)


class Queue(fluxmoe.EvictionPolicy):
    """A first-in, first-out policy with its own records."""

    def __init__(self):
        self.entered = {}

    def on_load(self, view, pages):
        self.entered.update(dict.fromkeys(pages.tolist(), view.event))

    def on_evict(self, view, pages):
        for page in pages.tolist():
            del self.entered[page]

    def select(self, view, pages, n):
        return sorted(pages.tolist(), key=lambda page: (self.entered[page], page))[:n]

    def reset(self):
        self.entered.clear()


def queue(r: Reference, page: int) -> float:
    return r.loaded[page]


class Fickle(LeastFrequentlyUsed):
    """A policy that releases about a third of the pages as soon as their layer has run."""

    def retain(self, view, access):
        return np.array([kept(view.event, page) for page in access.pages.tolist()], np.bool_)


def kept(event: int, page: int) -> bool:
    return (page * 5 + event) % 3 != 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy, with its order (lowest first) and ``retain`` as functions of event and page."""

    make: Callable[[], fluxmoe.EvictionPolicy]
    key: Callable[[Reference, int], float]
    keeps: Callable[[int, int], bool] = lambda event, page: True


EVICTION = {
    "lru": Entry(LeastRecentlyUsed, lru),
    "lfu": Entry(LeastFrequentlyUsed, lfu),
    "lfru": Entry(LeastFrequentlyRecentlyUsed, reference.lfru),
    "immediate": Entry(Immediate, lru, lambda event, page: False),
    "next-use": Entry(NextUse, reference.next_use),
    "numpy": Entry(Quadratic, reference.quadratic),
    "python": Entry(Infinite, infinite),
    "stable-falling": Entry(Falling, falling),
    "fickle": Entry(Fickle, lfu, kept),
    "select": Entry(HighestPages, reference.highest_pages),
    "queue": Entry(Queue, queue),
    "kernel": Entry(Kernel, reference.kernel),
    "stable-kernel": Entry(StableKernel, reference.stable_kernel),
}


class Wild(fluxmoe.PrefetchPolicy):
    """A prefetch policy that proposes pages of any other layer in any order, some of them twice."""

    def propose(self, view, access):
        return wild(view.event, access.layer, view.num_layers, view.experts_per_layer)


def wild(event: int, layer: int, layers: int, experts: int) -> list[int]:
    count = event * 7 % (layers * experts // 2)
    pages = [(event * 13 + i * i * 5 + i) % (layers * experts) for i in range(count)]
    return [page for page in pages if page // experts != layer]


def faulty(policy, every: int):
    """Make ``policy`` fail in about one of ``every`` calls, counted in ``raised``."""
    kind = type(policy)
    answers = [name for name in ("score", "select", "retain", "propose") if _overrides(kind, name)]
    hooks = [name for name in ("on_access", "on_load", "on_evict") if hasattr(kind, name)]
    methods = {
        name: _failing(getattr(kind, name), name in hooks, every) for name in answers + hooks
    }
    policy.__class__ = type(f"Faulty{kind.__name__}", (kind,), methods)
    policy.calls = policy.raised = 0
    return policy


def _overrides(kind: type, name: str) -> bool:
    base = fluxmoe.EvictionPolicy if issubclass(kind, fluxmoe.EvictionPolicy) else None
    return hasattr(kind, name) and (base is None or getattr(kind, name) is not getattr(base, name))


def _failing(method, is_hook: bool, every: int):
    def call(self, view, *args):
        self.calls += 1
        if (self.calls * 2654435761 >> 7) % every:
            return method(self, view, *args)
        self.raised += 1
        if is_hook or self.raised % 4 == 0:
            raise ValueError("planned")
        # None of these can be a valid answer to any call.
        return ["nonsense", None, [[0.5], [1]]][self.raised % 3]

    return call
