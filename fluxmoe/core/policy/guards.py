"""Guards, the host's side of policies. Each guard validates the answers of one kind of policy.

A policy is trusted code that may have bugs: if a call raises or returns an invalid answer, the call
falls back to LRU, no prefetch or the current split (see ``faults``). A slow call is counted, and a
call that takes far too long is interrupted, which is a fault (see ``watchdog``). Arrays are copied
on the way to a policy (``paging.own``) and on the way back (``answers``). Attacks are not
contained: plugins run with the privileges of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.lowest import lowest
from fluxmoe.core.compiled.score_kernel import Kernel, KernelRows, compile_kernel
from fluxmoe.core.policy import answers
from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split
from fluxmoe.core.policy.faults import Fault, PolicyCaller, PolicyGuard, contained
from fluxmoe.core.policy.paging import EvictionPolicy, PageView, PrefetchPolicy, own
from fluxmoe.core.policy.watchdog import (
    DEFAULT_LIMITS,
    HardLimitExceeded,
    Limits,
    TimeLimiter,
)
from fluxmoe.core.types import Access, Bools, Int64s
from fluxmoe.errors import PolicyFaultError
from fluxmoe.words import line


class EvictionGuard(PolicyGuard):
    """Calls an eviction policy for the event rule."""

    def __init__(
        self,
        policy: EvictionPolicy,
        view: PageView,
        *,
        name: str,
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(PolicyCaller(policy, "eviction", name, strict=strict, limits=limits))
        self._policy, self._view = policy, view
        self._promises_stable = self._faults.declared("stable_score", answers.flag, False)
        self._kernel = _compile(policy, view, name, self._promises_stable)
        overrides = {
            method: getattr(type(policy), method) is not getattr(EvictionPolicy, method)
            for method in ("on_access", "on_load", "on_evict", "retain", "select")
        }
        # Hooks that the policy does not override are not called, which saves time.
        self.watches_access = overrides["on_access"]
        self.watches_load = overrides["on_load"]
        self.watches_evict = overrides["on_evict"]
        self.retains = overrides["retain"]
        self._selects = overrides["select"]

    @property
    def stable(self) -> bool:
        """True if the host may keep pages in order of their ``scores`` (``heap.VictimHeap``)."""
        return self._promises_stable and not self._selects and not self._faults.out

    @property
    def kernel(self) -> Kernel | None:
        """Compiled replacement for ``scores``; None if there is none or the policy is disabled."""
        return None if self._selects or self._faults.out else self._kernel

    @property
    def scored(self) -> bool:
        """True if the policy is called only to choose victims (``choose``), not for hooks."""
        watches = self.watches_access or self.watches_load or self.watches_evict
        return not watches and not self.retains

    @property
    def future(self) -> Int64s | None:
        """Next use of every page, int64 ``[pages]``; None unless the policy is an oracle."""
        return self._view._future

    def limited(self, function: Callable[..., int], *args: object) -> int | None:
        """Call compiled code that runs the kernel; return None after a fault."""
        return self._faults.run("score_kernel", function, *args)

    def reset(self) -> None:
        self._faults.contain("reset")

    def on_access(self, access: Access) -> None:
        self._faults.contain("on_access", self._view, access)

    def on_load(self, pages: Int64s) -> None:
        self._faults.contain("on_load", self._view, own(pages))

    def on_evict(self, pages: Int64s) -> None:
        self._faults.contain("on_evict", self._view, own(pages))

    def retained(self, access: Access) -> Bools | None:
        """Return, for each page of the event, False to free its slot; None after a fault."""
        return self._faults.ask(
            "retain", (self._view, access), partial(answers.bools, count=len(access.pages))
        )

    def scores(self, pages: Int64s) -> npt.NDArray[np.float64] | None:
        """Return valid scores of ``pages``; None after a fault."""
        if len(pages) == 0:
            return np.zeros(0)  # without a call: not every policy handles an empty array
        raw = self._raw_scores(pages)
        return None if raw is None else raw.astype(np.float64)

    def choose(self, pages: Int64s, count: int) -> Int64s:
        """Choose ``count`` victims among ``pages`` (ascending), lowest score first."""
        if count and not self._faults.out:
            victims = self._select(pages, count) if self._selects else self._lowest(pages, count)
            if victims is not None:
                return victims
        return self.least_recent(pages, count)

    def least_recent(self, pages: Int64s, count: int) -> Int64s:
        """Choose victims by LRU, the fallback for faulty policies."""
        return _lowest(self._view._table.books.last_use[pages], pages, count)

    def _lowest(self, pages: Int64s, count: int) -> Int64s | None:
        scores = self._raw_scores(pages)
        return None if scores is None else _lowest(scores, pages, count)

    def _select(self, pages: Int64s, count: int) -> Int64s | None:
        read = partial(answers.victims, candidates=pages, count=count)
        return self._faults.ask("select", (self._view, own(pages), count), read)

    def _raw_scores(self, pages: Int64s) -> npt.NDArray[Any] | None:
        if self._kernel is not None:
            return self._faults.run("score_kernel", self._kernel_scores, pages)
        read = partial(answers.scores, count=len(pages))
        return self._faults.ask("score", (self._view, own(pages)), read)

    def _kernel_scores(self, pages: Int64s) -> npt.NDArray[Any]:
        assert self._kernel is not None
        view, books = self._view, self._view._table.books
        numbers = books.last_use, books.use_count, books.loaded_at
        layer = np.repeat(np.arange(view.num_layers), view.experts_per_layer)
        future = np.zeros_like(layer) if view._future is None else view._future
        rows = KernelRows(*numbers, pages, layer, future)
        scores = self._kernel.scores(rows, view.event, view.layer, view.num_layers)
        return answers.scores(scores, len(pages))


class PrefetchGuard(PolicyGuard):
    """Calls a prefetch policy for the event rule; a policy with ``lead = 0`` is never called."""

    def __init__(
        self,
        policy: PrefetchPolicy,
        view: PageView,
        *,
        name: str,
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(PolicyCaller(policy, "prefetch", name, strict=strict, limits=limits))
        self._policy, self._view = policy, view
        lead = partial(answers.whole, least=0, noun="layers")
        self._leads = self._faults.declared("lead", lead, 0) > 0
        self._predictions = self._faults.declared("predictions", answers.flag, False)
        #: The policy's ``waste``.
        self.waste = self._faults.declared("waste", answers.share, inf)

    @property
    def active(self) -> bool:
        return self._leads and not self._faults.out

    @property
    def predictions(self) -> bool:
        """True if the policy needs ``Access.predicted``."""
        return self._predictions and self.active

    def reset(self) -> None:
        self._faults.contain("reset")

    def propose(self, access: Access) -> Int64s:
        """Return valid proposals without repeats, most urgent first; no proposals after a fault."""
        read = partial(
            answers.proposals,
            layer=access.layer,
            num_layers=self._view.num_layers,
            experts=self._view.experts_per_layer,
        )
        pages = self._faults.ask("propose", (self._view, access), read)
        return np.zeros(0, np.int64) if pages is None else pages


def _lowest(scores: npt.NDArray[Any], pages: Int64s, count: int) -> Int64s:
    out = np.empty(min(count, len(pages)), np.int64)
    if len(out):
        lowest(scores, pages, len(out), np.empty(len(out), scores.dtype), out)
    return out


def _compile(policy: EvictionPolicy, view: PageView, name: str, stable: bool) -> Kernel | None:
    # The most derived definition wins: a subclass that defines `score` overrides an inherited
    # kernel. If one class defines both, the kernel replaces `score`.
    for cls in type(policy).__mro__:
        if "score_kernel" in vars(cls) or "make_kernel" in vars(cls):
            break
        if "score" in vars(cls):
            return None
    what = f"eviction policy {name!r}"
    make = partial(contained, lambda: policy.make_kernel(view))
    try:
        function = TimeLimiter(DEFAULT_LIMITS).call(make, ())
    except HardLimitExceeded:
        raise PolicyFaultError(
            f"{what}: make_kernel took more than {DEFAULT_LIMITS.hard_s:g} s"
        ) from None
    if isinstance(function, Fault):
        raise PolicyFaultError(f"{what}: make_kernel {function.said}") from function.cause
    if function is None:
        return None
    made = contained(partial(compile_kernel, by_slot=not stable), (function,))
    if isinstance(made, Fault):
        raise PolicyFaultError(
            f"{what}: numba cannot compile score_kernel: {line(made.cause, limit=2000)}",
            fix="use (int, int, int, int, int) -> float in the subset of Python that numba "
            "supports, or define score instead of score_kernel",
        ) from made.cause
    return made


class ArbitrationGuard(PolicyGuard):
    """Calls an arbitration policy, validates its answers and contains its faults."""

    def __init__(
        self,
        policy: ArbitrationPolicy,
        *,
        name: str,
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(PolicyCaller(policy, "arbitration", name, strict=strict, limits=limits))
        self.fixed = self._faults.declared("fixed", answers.flag, False)
        steps = partial(answers.whole, least=1, noun="steps")
        self.interval = self._faults.declared("interval", steps, 1)
        self.calm_interval = self._faults.declared("calm_interval", steps, 1)

    def split(self, view: ArbitrationView) -> Split:
        """Return the policy's split, or the current one after a fault."""
        found = self._faults.ask("split", (view,), partial(answers.split, view=view))
        return Split(view.frames) if found is None else found
