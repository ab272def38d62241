"""Guards: the host's side of a policy. Validates every answer and contains every fault.

A policy is trusted code that may be wrong: if it raises, or answers with nonsense, that one call
falls back to LRU, the fault is counted and logged once under the name the policy was registered
with, and after ``strikes`` faults the policy is out for good. ``strict`` raises instead. A call
that takes too long is counted, or interrupted, which is a fault (see ``limits``). Attacks are not
contained: a plugin runs with the rights of the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.kernel import Kernel, Rows, compile_kernel
from fluxmoe.core.limits import (
    DEFAULT_LIMITS,
    HardLimitExceeded,
    Limits,
    Stopwatch,
    from_signal,
)
from fluxmoe.core.lowest import lowest
from fluxmoe.core.policy import EvictionPolicy, PageView, PrefetchPolicy, read_only
from fluxmoe.core.types import Access, Int64s
from fluxmoe.core.words import LIMIT, line, raised
from fluxmoe.errors import PolicyFaultError

logger = logging.getLogger("fluxmoe")

_NO_ANSWER: Any = object()  # None is an answer, and a wrong one


class FaultCounter:
    """Calls one policy, counts its faults and decides what follows."""

    def __init__(self, kind: str, name: str, strict: bool, limits: Limits) -> None:
        self.kind, self.name, self.strict, self.limits = kind, name, strict, limits
        self.count = 0
        self._watch = Stopwatch(limits)
        self._reported: set[str] = set()
        self._reported_slow = False

    @property
    def out(self) -> bool:
        return self.count >= self.limits.strikes

    @property
    def slow(self) -> int:
        return self._watch.slow

    def contain(self, method: str, hook: Callable[..., object], *args: object) -> None:
        """Call a hook, which answers nothing; a policy that is out is not called any more."""
        self.call(method, hook, args)

    def answer(self, method: str, function: Callable[..., object], *args: object) -> object | None:
        """Whatever a method answers, not yet validated; None after a fault, or if it is out."""
        answer = self.call(method, function, args)
        if answer is None:
            self.note(method, "gave None")
        return None if answer is _NO_ANSWER else answer

    def ask(
        self, method: str, function: Callable[..., npt.ArrayLike], *args: object
    ) -> npt.NDArray[Any] | None:
        """The answer as an array, not yet validated; None after a fault, or if it is out."""
        answer = self.call(method, function, args)
        # An array of a subclass, say a masked one, would not do what the host expects of arrays.
        if answer is not _NO_ANSWER and type(answer) is not np.ndarray:
            # Limited, too: it may be an object that takes its time to make an array.
            answer = self.call(method, np.asarray, (answer,))
        return None if answer is _NO_ANSWER else answer

    def call(self, method: str, function: Callable[..., Any], args: tuple[object, ...]) -> Any:
        """The answer; ``_NO_ANSWER`` after a fault, or if the policy is out."""
        if self.count >= self.limits.strikes:
            return _NO_ANSWER
        watch = self._watch
        try:
            answer = watch.call(function, args)
        except HardLimitExceeded:
            self.note(method, f"took more than {self.limits.hard_s:g} s")
            return _NO_ANSWER
        except BaseException as error:  # sys.exit() in a policy must not end the engine
            if isinstance(error, KeyboardInterrupt) or from_signal(error):
                raise
            self.note(method, error)
            return _NO_ANSWER
        # One slow call may be the machine's doing; as many as there are strikes are the policy's.
        if watch.slow >= self.limits.strikes and not self._reported_slow:
            self._reported_slow = True
            logger.warning(
                "%s policy %r: %d calls took more than %g ms, the last one of %s (reported once)",
                *(self.kind, self.name, watch.slow, self.limits.soft_s * 1e3, method),
            )
        return answer

    def note(self, method: str, problem: BaseException | str) -> None:
        """Count a fault of ``method``; raises PolicyFaultError if strict."""
        # Here whatever a policy has said or raised becomes words of ours.
        said = f"raised {raised(problem)}" if isinstance(problem, BaseException) else problem
        what = f"{self.kind} policy {self.name!r}: {method} {line(said, limit=2 * LIMIT)}"
        if self.strict:
            cause = problem if isinstance(problem, BaseException) else None
            raise PolicyFaultError(
                what, fix="run without --strict-policies to contain it"
            ) from cause
        self.count += 1
        if method not in self._reported:
            self._reported.add(method)
            logger.warning("%s; this call falls back to the default (reported once)", what)
        if self.count == self.limits.strikes:
            logger.warning(
                "%s policy %r is replaced after %d faults", self.kind, self.name, self.count
            )


class PolicyGuard:
    """What every guard can tell about its policy."""

    def __init__(self, faults: FaultCounter) -> None:
        self._faults = faults

    @property
    def name(self) -> str:
        return self._faults.name

    @property
    def faults(self) -> int:
        """Faults contained so far."""
        return self._faults.count

    @property
    def limits(self) -> Limits:
        return self._faults.limits

    @property
    def slow(self) -> int:
        """Calls so far that were answered, but took longer than the soft limit."""
        return self._faults.slow


class EvictionGuard(PolicyGuard):
    """An eviction policy as the event rule calls it."""

    def __init__(
        self,
        policy: EvictionPolicy,
        view: PageView,
        *,
        name: str,
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(FaultCounter("eviction", name, strict, limits))
        self._policy, self._view = policy, view
        self._promises_stable = policy.stable_score  # once: it may be a property that fails
        self._kernel = _compile(policy, view, name, self._promises_stable)
        overrides = {
            method: getattr(type(policy), method) is not getattr(EvictionPolicy, method)
            for method in ("on_access", "on_load", "on_evict", "retain", "select")
        }
        # Hooks that a policy does not override are never called: they would cost for nothing.
        self.watches_access = overrides["on_access"]
        self.watches_load = overrides["on_load"]
        self.watches_evict = overrides["on_evict"]
        self.retains = overrides["retain"]
        self._selects = overrides["select"]

    @property
    def stable(self) -> bool:
        """Whether the host keeps the order (``order.VictimHeap``) from ``scores``."""
        return self._promises_stable and not self._selects and not self._faults.out

    @property
    def kernel(self) -> Kernel | None:
        """What compiled code may ask in place of ``scores``; None if there is none or it is out."""
        return None if self._selects or self._faults.out else self._kernel

    @property
    def scored(self) -> bool:
        """Whether nothing but ``choose`` is ever asked, so that events need no call before it."""
        watches = self.watches_access or self.watches_load or self.watches_evict
        return not watches and not self.retains

    @property
    def future(self) -> Int64s | None:
        """The next use of every page, if the policy knows the future."""
        return self._view.future

    def limited(self, function: Callable[..., int], *args: object) -> int | None:
        """Call compiled code that runs the kernel; None if that took too long."""
        found = self._faults.call("score_kernel", function, args)
        return None if found is _NO_ANSWER else found

    def reset(self) -> None:
        self._faults.contain("reset", self._policy.reset)

    def on_access(self, access: Access) -> None:
        self._faults.contain("on_access", self._policy.on_access, self._view, access)

    def on_load(self, pages: Int64s) -> None:
        self._faults.contain("on_load", self._policy.on_load, self._view, read_only(pages))

    def on_evict(self, pages: Int64s) -> None:
        self._faults.contain("on_evict", self._policy.on_evict, self._view, read_only(pages))

    def leaving(self, access: Access) -> Int64s:
        """The event's pages that the policy does not retain; none after a fault."""
        keep = self._faults.ask("retain", self._policy.retain, self._view, access)
        if keep is None:
            return access.pages[:0]
        if keep.dtype != np.bool_ or keep.shape != access.pages.shape:
            self._faults.note("retain", f"gave {_shape(keep)}, not {len(access.pages)} bools")
            return access.pages[:0]
        leaving: Int64s = access.pages[~keep]
        return leaving

    def scores(self, pages: Int64s) -> npt.NDArray[np.float64] | None:
        """Valid scores of ``pages``, or None after a fault."""
        if len(pages) == 0:
            return np.zeros(0)  # not worth a call, and not every policy can take none
        raw = self._raw_scores(pages)
        return None if raw is None else raw.astype(np.float64)

    def choose(self, pages: Int64s, count: int) -> Int64s:
        """``count`` victims among ``pages`` (ascending), the lowest score first."""
        if count and not self._faults.out:
            victims = self._select(pages, count) if self._selects else self._lowest(pages, count)
            if victims is not None:
                return victims
        return self.least_recent(pages, count)

    def least_recent(self, pages: Int64s, count: int) -> Int64s:
        """What a faulty policy falls back to: LRU."""
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
            self._faults.note("select", f"gave {_shape(victims)}, not {count} pages")
            return None
        victims = victims.astype(np.int64)
        if len(np.unique(victims)) != count or not np.isin(victims, pages).all():
            self._faults.note("select", "gave a page twice, or one that was no candidate")
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
            self._faults.note("score", f"gave {_shape(scores)}, not {len(pages)} numbers")
            return None
        if scores.dtype.kind == "f" and np.isnan(scores).any():
            self._faults.note("score", "gave NaN")
            return None
        return scores

    def _kernel_scores(self, pages: Int64s) -> npt.NDArray[np.float64]:
        assert self._kernel is not None
        view = self._view
        numbers = view.last_use, view.use_count, view.loaded_at
        layer = np.repeat(np.arange(view.num_layers), view.experts_per_layer)
        future = np.zeros_like(layer) if view.future is None else view.future
        rows = Rows(*numbers, pages, layer, future)
        return self._kernel.scores(rows, view.event, view.layer, view.num_layers)


class PrefetchGuard(PolicyGuard):
    """A prefetch policy as the event rule calls it. One that leads by no layer is never asked."""

    def __init__(
        self,
        policy: PrefetchPolicy,
        view: PageView,
        *,
        name: str,
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(FaultCounter("prefetch", name, strict, limits))
        self._policy, self._view = policy, view
        self._leads = policy.lead > 0
        self._num_pages = view.num_layers * view.experts_per_layer

    @property
    def active(self) -> bool:
        return self._leads and not self._faults.out

    def reset(self) -> None:
        self._faults.contain("reset", self._policy.reset)

    def propose(self, access: Access) -> Int64s:
        """Valid proposals without repeats, most urgent first; none after a fault."""
        none = access.pages[:0]
        pages = self._faults.ask("propose", self._policy.propose, self._view, access)
        if pages is None or pages.size == 0:
            return none
        if pages.dtype.kind not in "iu" or pages.ndim != 1:
            self._faults.note("propose", f"gave {_shape(pages)}, not a list of pages")
            return none
        if pages.min() < 0 or pages.max() >= self._num_pages:
            self._faults.note("propose", f"gave a page outside 0…{self._num_pages - 1}")
            return none
        if np.any(pages // self._view.experts_per_layer == access.layer):
            self._faults.note("propose", "gave a page of the running layer")
            return none
        first = np.unique(pages, return_index=True)[1]
        return pages[np.sort(first)].astype(np.int64)


def _shape(array: npt.NDArray[Any]) -> str:
    if array.ndim == 0 and array.dtype == object:
        return line(array.item(), repr)
    return f"{array.dtype} of shape {array.shape}"


def _lowest(scores: npt.NDArray[Any], pages: Int64s, count: int) -> Int64s:
    if scores.dtype.kind == "f" and scores.dtype.itemsize not in (4, 8):
        scores = scores.astype(np.float64)  # numba knows neither half nor long double
    out = np.empty(min(count, len(pages)), np.int64)
    if len(out):
        scores = np.ascontiguousarray(scores)
        lowest(scores, pages, len(out), np.empty(len(out), scores.dtype), out)
    return out


def _compile(policy: EvictionPolicy, view: PageView, name: str, stable: bool) -> Kernel | None:
    # The more derived definition wins: who subclasses a policy with a kernel and defines `score`
    # means it. Defined by one class, the kernel takes the place of `score`.
    for cls in type(policy).__mro__:
        if "score_kernel" in vars(cls) or "make_kernel" in vars(cls):
            break
        if "score" in vars(cls):
            return None
    try:
        kernel = Stopwatch(DEFAULT_LIMITS).call(policy.make_kernel, (view,))
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
            fix="use (int, int, int, int, int) -> float in the subset of Python numba supports, "
            "or leave score_kernel out and define score",
        ) from error
