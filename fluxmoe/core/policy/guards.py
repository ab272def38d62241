"""Guards: the host's side of policies. Each validates the answers of one kind of policy.

A policy is trusted code that may have bugs: if it raises or returns an invalid answer, that call
falls back to LRU, no prefetch or the current split (see ``faults``). A call that takes too long is
counted or interrupted, which is a fault (see ``watchdog``). Attacks are not contained: plugins run
with the privileges of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.lowest import lowest
from fluxmoe.core.compiled.score_kernel import Kernel, KernelRows, compile_kernel
from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split
from fluxmoe.core.policy.faults import NO_ANSWER, PolicyCaller, PolicyGuard
from fluxmoe.core.policy.paging import EvictionPolicy, PageView, PrefetchPolicy, read_only
from fluxmoe.core.policy.watchdog import (
    DEFAULT_LIMITS,
    HardLimitExceeded,
    Limits,
    TimeLimiter,
)
from fluxmoe.core.types import Access, Int64s
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
        super().__init__(PolicyCaller("eviction", name, strict, limits))
        self._policy, self._view = policy, view
        self._promises_stable = policy.stable_score  # read once: it may be a property that raises
        self._kernel = _compile(policy, view, name, self._promises_stable)
        overrides = {
            method: getattr(type(policy), method) is not getattr(EvictionPolicy, method)
            for method in ("on_access", "on_load", "on_evict", "retain", "select")
        }
        # Hooks that the policy does not override are not called, to save the time.
        self.watches_access = overrides["on_access"]
        self.watches_load = overrides["on_load"]
        self.watches_evict = overrides["on_evict"]
        self.retains = overrides["retain"]
        self._selects = overrides["select"]

    @property
    def stable(self) -> bool:
        """True if the host keeps pages in order of their ``scores`` (``heap.VictimHeap``)."""
        return self._promises_stable and not self._selects and not self._faults.out

    @property
    def kernel(self) -> Kernel | None:
        """Compiled replacement for ``scores``; None if there is none or the policy is disabled."""
        return None if self._selects or self._faults.out else self._kernel

    @property
    def scored(self) -> bool:
        """True if ``choose`` is the only method called, so events need no earlier call."""
        watches = self.watches_access or self.watches_load or self.watches_evict
        return not watches and not self.retains

    @property
    def future(self) -> Int64s | None:
        """Next use of every page, int64 ``[pages]``; None unless the policy is an oracle."""
        return self._view.future

    def limited(self, function: Callable[..., int], *args: object) -> int | None:
        """Call compiled code that runs the kernel; None after a fault."""
        found = self._faults.call("score_kernel", function, args)
        return None if found is NO_ANSWER else found

    def reset(self) -> None:
        self._faults.contain("reset", self._policy.reset)

    def on_access(self, access: Access) -> None:
        self._faults.contain("on_access", self._policy.on_access, self._view, access)

    def on_load(self, pages: Int64s) -> None:
        self._faults.contain("on_load", self._policy.on_load, self._view, read_only(pages))

    def on_evict(self, pages: Int64s) -> None:
        self._faults.contain("on_evict", self._policy.on_evict, self._view, read_only(pages))

    def leaving(self, access: Access) -> Int64s:
        """Return the event's pages that the policy does not retain; none after a fault."""
        keep = self._faults.ask("retain", self._policy.retain, self._view, access)
        if keep is None:
            return access.pages[:0]
        if keep.dtype != np.bool_ or keep.shape != access.pages.shape:
            self._faults.note("retain", f"returned {_shape(keep)}, not {len(access.pages)} bools")
            return access.pages[:0]
        leaving: Int64s = access.pages[~keep]
        return leaving

    def scores(self, pages: Int64s) -> npt.NDArray[np.float64] | None:
        """Return valid scores of ``pages``; None after a fault."""
        if len(pages) == 0:
            return np.zeros(0)  # saves a call, and not every policy handles an empty array
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
        return _lowest(self._view.last_use[pages], pages, count)

    def _lowest(self, pages: Int64s, count: int) -> Int64s | None:
        scores = self._raw_scores(pages)
        if scores is None:
            return None
        return _lowest(scores, pages, count)

    def _select(self, pages: Int64s, count: int) -> Int64s | None:
        victims = self._faults.ask(
            "select", self._policy.select, self._view, read_only(pages), count
        )
        if victims is None:
            return None
        if victims.dtype.kind not in "iu" or victims.shape != (count,):
            self._faults.note("select", f"returned {_shape(victims)}, not {count} pages")
            return None
        victims = victims.astype(np.int64)
        if len(np.unique(victims)) != count or not np.isin(victims, pages).all():
            self._faults.note("select", "returned a duplicate or a page that was not a candidate")
            return None
        return victims

    def _raw_scores(self, pages: Int64s) -> npt.NDArray[Any] | None:
        if self._kernel is None:
            scores = self._faults.ask("score", self._policy.score, self._view, read_only(pages))
        else:
            scores = self._faults.ask("score_kernel", self._kernel_scores, pages)
        if scores is None:
            return None
        if scores.dtype.kind not in "iuf" or scores.shape != pages.shape:
            self._faults.note("score", f"returned {_shape(scores)}, not {len(pages)} numbers")
            return None
        if scores.dtype.kind == "f" and np.isnan(scores).any():
            self._faults.note("score", "returned NaN")
            return None
        return scores

    def _kernel_scores(self, pages: Int64s) -> npt.NDArray[np.float64]:
        assert self._kernel is not None
        view = self._view
        numbers = view.last_use, view.use_count, view.loaded_at
        layer = np.repeat(np.arange(view.num_layers), view.experts_per_layer)
        future = np.zeros_like(layer) if view.future is None else view.future
        rows = KernelRows(*numbers, pages, layer, future)
        return self._kernel.scores(rows, view.event, view.layer, view.num_layers)


class PrefetchGuard(PolicyGuard):
    """Calls a prefetch policy for the event rule; one with ``lead = 0`` is never called."""

    def __init__(
        self,
        policy: PrefetchPolicy,
        view: PageView,
        *,
        name: str,
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(PolicyCaller("prefetch", name, strict, limits))
        self._policy, self._view = policy, view
        self._leads = policy.lead > 0
        self._num_pages = view.num_layers * view.experts_per_layer

    @property
    def active(self) -> bool:
        return self._leads and not self._faults.out

    def reset(self) -> None:
        self._faults.contain("reset", self._policy.reset)

    def propose(self, access: Access) -> Int64s:
        """Return valid proposals without repeats, most urgent first; none after a fault."""
        none = access.pages[:0]
        pages = self._faults.ask("propose", self._policy.propose, self._view, access)
        if pages is None or pages.size == 0:
            return none
        if pages.dtype.kind not in "iu" or pages.ndim != 1:
            self._faults.note("propose", f"returned {_shape(pages)}, not a list of pages")
            return none
        if pages.min() < 0 or pages.max() >= self._num_pages:
            self._faults.note("propose", f"returned a page outside 0…{self._num_pages - 1}")
            return none
        if np.any(pages // self._view.experts_per_layer == access.layer):
            self._faults.note("propose", "returned a page of the current layer")
            return none
        first = np.unique(pages, return_index=True)[1]
        return pages[np.sort(first)].astype(np.int64)


def _shape(array: npt.NDArray[Any]) -> str:
    if array.ndim == 0 and array.dtype == object:
        return line(array.item(), repr)
    return f"{array.dtype} of shape {array.shape}"


def _lowest(scores: npt.NDArray[Any], pages: Int64s, count: int) -> Int64s:
    if scores.dtype.kind == "f" and scores.dtype.itemsize not in (4, 8):
        scores = scores.astype(np.float64)  # numba supports neither half nor long double
    out = np.empty(min(count, len(pages)), np.int64)
    if len(out):
        scores = np.ascontiguousarray(scores)
        lowest(scores, pages, len(out), np.empty(len(out), scores.dtype), out)
    return out


def _compile(policy: EvictionPolicy, view: PageView, name: str, stable: bool) -> Kernel | None:
    # The more derived definition wins: a subclass that defines `score` overrides an inherited
    # kernel. If one class defines both, the kernel replaces `score`.
    for cls in type(policy).__mro__:
        if "score_kernel" in vars(cls) or "make_kernel" in vars(cls):
            break
        if "score" in vars(cls):
            return None
    try:
        kernel = TimeLimiter(DEFAULT_LIMITS).call(policy.make_kernel, (view,))
        if kernel is None:
            return None
        return compile_kernel(kernel, by_slot=not stable)
    except HardLimitExceeded:
        raise PolicyFaultError(
            f"eviction policy {name!r}: make_kernel took more than {DEFAULT_LIMITS.hard_s:g} s"
        ) from None
    except (Exception, SystemExit) as error:
        raise PolicyFaultError(
            f"eviction policy {name!r}: numba cannot compile score_kernel: "
            f"{line(error, limit=2000)}",
            fix="use (int, int, int, int, int) -> float in the subset of Python that numba "
            "supports, or define score instead of score_kernel",
        ) from error


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
        self._policy = policy
        super().__init__(PolicyCaller("arbitration", name, strict, limits))
        self.fixed = policy.fixed
        self.interval = self._steps("interval")
        self.calm_interval = self._steps("calm_interval")

    def _steps(self, attribute: str) -> int:
        steps: object = getattr(self._policy, attribute)
        if isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1:
            return steps
        self._faults.note(attribute, f"is {line(steps, repr)}, not a number of steps")
        return 1

    def split(self, view: ArbitrationView) -> Split:
        """Return the policy's split, or the current one after a fault."""
        answer = self._faults.answer("split", self._policy.split, view)
        if answer is None:
            return Split(view.frames)
        reason: object = getattr(answer, "reason", None)
        if type(answer) is Split and answer.frames is view.frames and type(reason) is str:
            return Split(view.frames, line(reason))  # as in most steps
        problem = _problem(answer, reason, view)
        if problem:
            self._faults.note("split", f"returned {problem}")
            return Split(view.frames)
        assert isinstance(answer, Split)
        # It ends up in the log, in messages between processes and in a metric label.
        return Split({name: int(count) for name, count in answer.frames.items()}, line(reason))


def _problem(answer: object, reason: object, view: ArbitrationView) -> str:
    """Describe the problem with an answer; empty if it is valid."""
    frames: object = getattr(answer, "frames", None)
    if not isinstance(answer, Split) or not isinstance(frames, Mapping):
        return f"{line(answer, repr)}, not a Split"
    if set(frames) != set(view.frames):
        return f"frames for {line(sorted(map(line, frames)))}, not for {sorted(view.frames)}"
    for name, count in frames.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            return f"{line(count, repr)} frames for {name}"
    # The current split is always valid, even if the limit has just been lowered.
    if sum(frames.values()) > max(view.total_frames, sum(view.frames.values())):
        return f"{line(sum(frames.values()))} frames of {view.total_frames}"
    if not isinstance(reason, str):
        return f"{line(reason, repr)} as a reason"
    return ""
