"""Audited guards: the host's guards, with every call checked against the contract.

A guard makes all calls to its policy through a ``PolicyCaller``. An audited guard uses an
``Auditor`` instead, which compares the state before and after each call, repeats calls that must be
pure, and raises an exception for each fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.answers import InvalidAnswer
from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView
from fluxmoe.core.policy.faults import PolicyCaller, suggestion
from fluxmoe.core.policy.guards import ArbitrationGuard, EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import EvictionPolicy, PageView, PrefetchPolicy
from fluxmoe.core.policy.watchdog import DEFAULT_LIMITS, HardLimitExceeded
from fluxmoe.core.types import Access, Int64s
from fluxmoe.errors import join
from fluxmoe.testing.conformance.report import Broken
from fluxmoe.words import line, raised

T = TypeVar("T")

_MEND = {
    "score": "return one number per page of `pages`, for instance an array made from view.last_use"
    "[pages]; ±inf is allowed, NaN is not",
    "score_kernel": "return a float for any page, including pages never used (last_use -1, "
    "use_count 0)",
    "select": "return n different pages out of `pages`, as integers",
    "retain": "return one bool per page of access.pages",
    "propose": "return pages of other layers as integers, or an empty list",
    "split": "return fluxmoe.Split with whole, non-negative frames for each tenant of view.frames, "
    "together at most view.total_frames; Split(view.frames) changes nothing",
}
#: Number of calls after which the fastest reflects the method rather than the machine.
_ENOUGH = 10
_KEEP_OFF = "the view belongs to the host: write only to arrays made by the policy"


class Auditor(PolicyCaller):
    """Makes the calls to one policy and records their problems.

    Args:
        policy: The policy.
        kind, view: Kind and view of the policy; arbitration policies have no permanent view.
        where: The replayed scene, for messages.

    Attributes:
        wrote: The first call that modified its input.
        impure: The first call that returned a different answer when repeated.
        fastest: Method → seconds of its fastest call.
        calls: Method → number of calls.
    """

    def __init__(self, policy: object, kind: str, view: PageView | None, where: str) -> None:
        super().__init__(policy, kind, "", strict=True, limits=DEFAULT_LIMITS)
        self._view, self._where = view, where
        self.wrote: Broken | None = None
        self.impure: Broken | None = None
        self.fastest: dict[str, float] = {}
        self.calls: Counter[str] = Counter()

    def run(self, method: str, function: Callable[..., T], *args: object) -> T:
        """Return the result of a call; raise Broken if the call fails."""
        call = self._called(method)
        try:
            return self._limiter.call(function, args)
        except HardLimitExceeded:
            raise Broken(
                f"it took more than {self.limits.hard_s:g} s and was interrupted",
                call=call,
                mend="make it faster: the engine waits for every call, and 5 ms is slow",
            ) from None
        except KeyboardInterrupt:
            raise
        except InvalidAnswer as refused:
            raise Broken(f"it {refused}", call=call, mend=_MEND.get(method, "")) from None
        except BaseException as error:  # including SystemExit
            raise Broken(
                f"it raised {raised(error)}", call=call, mend=_mend(error, method)
            ) from error

    def ask(self, method: str, args: tuple[object, ...], read: Callable[[object], T]) -> T:
        """Return the answer, after comparing the policy's input before and after the call."""
        shown = args if self._view is None else (self._view, *args)
        before = _Shown(shown)
        dice = None if self._view is None else self._view.rng.bit_generator.state
        started = perf_counter()
        answer = super().ask(method, args, read)
        took = perf_counter() - started
        self.calls[method] += 1
        self.fastest[method] = min(took, self.fastest.get(method, took))
        changed = before.changed(_Shown(shown))
        if changed and self.wrote is None:
            self.wrote = Broken(f"it changed {changed}", call=self._called(method), mend=_KEEP_OFF)
        if method == "score" and self.impure is None:
            assert self._view is not None
            assert dice is not None
            self._view.rng.bit_generator.state = dice
            again: Any = super().ask(method, args, read)
            self._compare(method, cast(Any, answer), again, args)
        return cast(T, answer)

    def _compare(
        self, method: str, first: npt.NDArray[Any], second: npt.NDArray[Any], args: tuple[Any, ...]
    ) -> None:
        if first.shape == second.shape and np.array_equal(first, second, equal_nan=_floats(first)):
            return
        found = "called twice in the same state, it returned different answers"
        if first.shape == second.shape and first.shape == args[1].shape:
            at = int(np.flatnonzero(first != second)[0])
            found += f": page {args[1][at]} got {first[at]}, then {second[at]}"
        self.impure = Broken(
            found,
            call=self._called(method),
            mend="use only view and pages, and only view.rng for randomness; change the policy's "
            "state in on_access and on_load, not in score",
        )

    def _called(self, method: str) -> str:
        view = self._view
        if view is None:
            return f"{method}(view), {self._where}"
        return (
            f"{method} in event {view.event} (step {view.step}, layer {view.layer}), {self._where}"
        )


#: Attributes of views that policies do not need.
_FOR_THE_HOST = {"NO_NEXT_USE"}


def _mend(error: BaseException, method: str) -> str:
    said = line(error)
    if "read-only" in said or "mappingproxy" in said:
        return _KEEP_OFF
    if isinstance(error, AttributeError) and "next_use" in said:
        return "avoid it, or set needs_future = True, which limits the policy to the simulator"
    if isinstance(error, AttributeError | NameError):
        owner = getattr(error, "obj", None)
        return join(suggestion(error), _attributes(owner, error.name, method))
    return _MEND.get(method, "")


def _attributes(owner: object, name: object, method: str) -> str:
    """Return a hint for a missing attribute: the valid attributes, or the place to set it."""
    if isinstance(owner, EvictionPolicy | PrefetchPolicy | ArbitrationPolicy):
        return f"set self.{name} in __init__, and again in reset, before {method} reads it"
    for contract in PageView, Access, ArbitrationView:
        if isinstance(owner, contract):
            own = {*dir(contract), *contract.__annotations__} - _FOR_THE_HOST
            shown = sorted(found for found in own if not found.startswith("_"))
            return f"a {contract.__name__} has {', '.join(shown)}"
    return ""


def _floats(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind in "fc"


class _Shown:
    """A copy of all input to a call."""

    def __init__(self, args: tuple[object, ...]) -> None:
        self._values: dict[str, Any] = {}
        for arg in args:
            if isinstance(arg, PageView):
                names: tuple[str, ...] = ("last_use", "use_count", "loaded_at", "resident")
                self._take("view", arg, names)
            elif isinstance(arg, Access):
                self._take("access", arg, tuple(field.name for field in fields(arg)))
            elif isinstance(arg, ArbitrationView):
                self._take("view", arg, ("frames", "bounds"))
                self._take("view.experts", arg.experts, ("curve",))
                self._take("view.prefixes", arg.prefixes, ("curve",))
            elif isinstance(arg, np.ndarray):
                self._values["pages"] = arg.copy()

    def _take(self, of: str, holder: object, names: tuple[str, ...]) -> None:
        for name in names:
            value = getattr(holder, name)
            copied = value.copy() if isinstance(value, np.ndarray) else value
            self._values[f"{of}.{name}"] = dict(value) if hasattr(value, "items") else copied

    def changed(self, now: _Shown) -> str:
        """Return the name of a value that has changed; empty if no value has."""
        for name, value in self._values.items():
            other = now._values[name]
            if isinstance(value, np.ndarray):
                if not np.array_equal(value, other):
                    return name
            elif value != other:
                return name
        return ""


class WatchedView(PageView):
    """A view that records in ``looks`` the events in which the policy read the future."""

    looks: list[int]

    def __init__(self, table: PageTable, *, seed: int, next_use: Int64s | None) -> None:
        object.__setattr__(self, "looks", [])  # views cannot be written to
        super().__init__(table, seed=seed, next_use=next_use)

    @property
    def next_use(self) -> Int64s:
        self.looks.append(self.event)
        return super().next_use


class AuditedEviction(EvictionGuard):
    """A guard that audits every call to an eviction policy."""

    def __init__(self, policy: EvictionPolicy, view: PageView, where: str) -> None:
        super().__init__(policy, view, name="", strict=True)
        self._faults = self.auditor = Auditor(policy, "eviction", view, where)


class AuditedPrefetch(PrefetchGuard):
    """A guard that audits every call to a prefetch policy.

    Attributes:
        reached: The first event whose proposals reached beyond ``lead``.
    """

    def __init__(self, policy: PrefetchPolicy, view: PageView, where: str) -> None:
        super().__init__(policy, view, name="", strict=True)
        self._faults = self.auditor = Auditor(policy, "prefetch", view, where)
        self.reached: Broken | None = None

    def propose(self, access: Access) -> Int64s:
        pages = super().propose(access)
        ahead = (pages // self._view.experts_per_layer - access.layer) % self._view.num_layers
        if len(pages) and ahead.max() > self._policy.lead and self.reached is None:
            page = pages[ahead.argmax()]
            self.reached = Broken(
                f"page {page} is {ahead.max()} layers ahead, but lead is {self._policy.lead}",
                call=f"propose in event {self._view.event}, layer {access.layer}",
                mend="set `lead` to the number of layers that proposals look ahead",
            )
        return pages


class AuditedArbitration(ArbitrationGuard):
    """A guard that audits every call to an arbitration policy."""

    def __init__(self, policy: ArbitrationPolicy, where: str) -> None:
        super().__init__(policy, name="", strict=True)
        self._faults = self.auditor = Auditor(policy, "arbitration", None, where)


@dataclass(frozen=True, slots=True)
class Seen:
    """The first problem of each kind in several replays."""

    wrote: Broken | None
    impure: Broken | None
    reached: Broken | None
    slow: Broken | None


def gather(auditors: list[Auditor], reached: Broken | None = None) -> Seen:
    """Combine the records of several replays."""
    fastest: dict[str, float] = {}
    calls: Counter[str] = Counter()
    for auditor in auditors:
        calls += auditor.calls
        for method, seconds in auditor.fastest.items():
            fastest[method] = min(seconds, fastest.get(method, seconds))
    limit = DEFAULT_LIMITS.soft_s
    late = (name for name in fastest if fastest[name] > limit and calls[name] >= _ENOUGH)
    slow = next(late, None)
    return Seen(
        wrote=next((a.wrote for a in auditors if a.wrote), None),
        impure=next((a.impure for a in auditors if a.impure), None),
        reached=reached,
        slow=None
        if slow is None
        else Broken(
            f"its fastest call took {fastest[slow] * 1e3:.1f} ms",
            call=slow,
            mend=f"use whole arrays and cache results: calls that take more than {limit * 1e3:g} "
            "ms count as slow, and the engine waits for them",
        ),
    )
