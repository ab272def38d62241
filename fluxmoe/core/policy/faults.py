"""Faults of policies: counted, logged once, and contained or raised.

A policy call that raises, takes too long or returns an invalid answer is a fault. The call falls
back to the default; after ``strikes`` faults the policy is disabled for good. In ``strict`` mode
faults are raised instead.
"""

from __future__ import annotations

import builtins
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.policy.watchdog import HardLimitExceeded, Limits, TimeLimiter
from fluxmoe.errors import PolicyFaultError, meant
from fluxmoe.words import LIMIT, from_signal, line, raised

logger = logging.getLogger("fluxmoe")

NO_ANSWER: Any = object()  # None is an (invalid) answer


class PolicyCaller:
    """Calls a policy; counts its faults and contains or raises them."""

    def __init__(self, kind: str, name: str, strict: bool, limits: Limits) -> None:
        self.kind, self.name, self.strict, self.limits = kind, name, strict, limits
        self.count = 0
        #: The last fault of a replaced policy; empty while it is in use.
        self.replaced = ""
        self._limiter = TimeLimiter(limits)
        self._reported: set[str] = set()
        self._reported_slow = False

    @property
    def out(self) -> bool:
        return self.count >= self.limits.strikes

    @property
    def slow(self) -> int:
        return self._limiter.slow

    def contain(self, method: str, hook: Callable[..., object], *args: object) -> None:
        """Call a hook without a return value; a disabled policy is not called."""
        self.call(method, hook, args)

    def answer(self, method: str, function: Callable[..., object], *args: object) -> object | None:
        """Return a method's answer, not yet validated; None after a fault or if disabled."""
        answer = self.call(method, function, args)
        if answer is None:
            self.note(method, "returned None")
        return None if answer is NO_ANSWER else answer

    def ask(
        self, method: str, function: Callable[..., npt.ArrayLike], *args: object
    ) -> npt.NDArray[Any] | None:
        """Return the answer as an array, not yet validated; None after a fault or if disabled."""
        answer = self.call(method, function, args)
        # A subclass of ndarray, such as a masked array, may not behave as the host expects.
        if answer is not NO_ANSWER and type(answer) is not np.ndarray:
            # Also timed: the object's conversion to an array may be slow.
            answer = self.call(method, np.asarray, (answer,))
        return None if answer is NO_ANSWER else answer

    def call(self, method: str, function: Callable[..., Any], args: tuple[object, ...]) -> Any:
        """Return the answer; ``NO_ANSWER`` after a fault or if the policy is disabled."""
        if self.count >= self.limits.strikes:
            return NO_ANSWER
        limiter = self._limiter
        try:
            answer = limiter.call(function, args)
        except HardLimitExceeded:
            self.note(method, f"took more than {self.limits.hard_s:g} s")
            return NO_ANSWER
        except BaseException as error:  # sys.exit() in a policy must not stop the engine
            if isinstance(error, KeyboardInterrupt) or from_signal(error):
                raise
            self.note(method, error)
            return NO_ANSWER
        if limiter.slow >= self.limits.strikes and not self._reported_slow:
            self._reported_slow = True
            logger.warning(
                "%s policy %r: %d calls worked for more than %g ms, most recently %s "
                "(reported once)",
                *(self.kind, self.name, limiter.slow, self.limits.soft_s * 1e3, method),
            )
        return answer

    def note(self, method: str, problem: BaseException | str) -> None:
        """Count a fault of ``method``; raises PolicyFaultError if strict."""
        # Text that the policy returned or raised is sanitised here.
        said, where, fix, cause = problem, "", "", None
        if isinstance(problem, BaseException):
            said, cause = f"raised {raised(problem)}", problem
            where, fix = _place(problem), suggestion(problem)
        fault = f"{method} {line(said, limit=2 * LIMIT)}"
        what = f"{self.kind} policy {self.name!r}: {fault}"
        if self.strict:
            contain = "contain it with --contain, or in an engine with strict_policies: false"
            fixes = "; ".join(filter(None, (fix, "correct the policy", contain)))
            raise PolicyFaultError(what, where=where, fix=fixes) from cause
        self.count += 1
        if method not in self._reported:
            self._reported.add(method)
            what = "; ".join(filter(None, (what, where, fix)))
            logger.warning("%s; this call falls back to the default (reported once)", what)
        if self.count == self.limits.strikes:
            self.replaced = fault
            logger.warning(
                "%s policy %r is replaced after %d faults", self.kind, self.name, self.count
            )


def _place(error: BaseException) -> str:
    """Return ``file:line`` of the policy's code that raised an exception; empty if there is none.

    It is the innermost line in the folder of the called method, not in a library called by it.
    """
    frames = [
        (frame.f_code.co_filename, at) for frame, at in traceback.walk_tb(error.__traceback__)
    ]
    outside = [frame for frame in frames if Path(frame[0]).parent != Path(__file__).parent]
    if not outside:
        return ""
    folder = Path(outside[0][0]).parent
    file, at = next(frame for frame in reversed(outside) if Path(frame[0]).parent == folder)
    return line(f"{file}:{at}")


def suggestion(error: BaseException) -> str:
    """Python's ``did you mean``, which it shows only for an exception that ends the program."""
    if not isinstance(error, AttributeError | NameError) or type(error.name) is not str:
        return ""
    try:
        if isinstance(error, AttributeError):
            known = dir(error.obj)
        else:
            frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
            known = [*frame.f_locals, *frame.f_globals, *dir(builtins)]
        return line(meant(error.name, known))
    except BaseException as failure:  # an object of the policy whose attributes cannot be listed
        if isinstance(failure, KeyboardInterrupt) or from_signal(failure):
            raise
        return ""


class PolicyGuard:
    """Properties common to all guards."""

    def __init__(self, faults: PolicyCaller) -> None:
        self._faults = faults

    @property
    def name(self) -> str:
        return self._faults.name

    @property
    def faults(self) -> int:
        """Number of faults contained so far."""
        return self._faults.count

    @property
    def replaced(self) -> str:
        """The last fault of a policy that was disabled for good; empty while it is in use."""
        return self._faults.replaced

    @property
    def limits(self) -> Limits:
        return self._faults.limits

    @property
    def slow(self) -> int:
        """Number of calls so far that returned, but ran longer than the soft limit."""
        return self._faults.slow
