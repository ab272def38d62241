"""Faults of policies, which are counted, logged once, and contained or raised.

A policy call that raises, takes too long or returns an invalid answer is a fault. The call falls
back to the default; after ``strikes`` faults the policy is disabled for good. In ``strict`` mode
faults are raised instead.

All of a policy's code runs within a timed call: its methods, the lookup of a method, the reading of
an answer (``answers``), and the formatting of exceptions that it raises.
"""

from __future__ import annotations

import builtins
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fluxmoe.core.policy.answers import InvalidAnswer, nothing
from fluxmoe.core.policy.watchdog import HardLimitExceeded, Limits, TimeLimiter
from fluxmoe.errors import PolicyFaultError, join, meant
from fluxmoe.words import LIMIT, interrupts, line, raised, traceback_of

logger = logging.getLogger("fluxmoe")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure of a policy.

    Attributes:
        said: Description that continues a sentence beginning with the method's name.
        where, fix: ``file:line`` of the policy's code, and a suggestion; both may be empty.
        cause: The exception, if it is to be raised.
    """

    said: str
    where: str = ""
    fix: str = ""
    cause: BaseException | None = None


def contained(
    function: Callable[..., T], args: tuple[object, ...] = (), keep: bool = True
) -> T | Fault:
    """Call ``function``; turn any exception into a ``Fault``, with the exception if ``keep``.

    ``HardLimitExceeded`` passes through, as do Ctrl-C and exceptions from signal handlers.
    """
    try:
        return function(*args)
    except InvalidAnswer as refused:
        return Fault(str(refused))
    except HardLimitExceeded:
        raise
    except BaseException as error:  # sys.exit() in a policy must not stop the engine
        if interrupts(error):
            raise
        return Fault(
            f"raised {raised(error)}", _place(error), suggestion(error), error if keep else None
        )


class PolicyCaller:
    """Calls a policy, counts its faults, and contains or raises them."""

    def __init__(
        self, policy: object, kind: str, name: str, *, strict: bool, limits: Limits
    ) -> None:
        self._policy = policy
        self.kind, self.name, self.strict, self.limits = kind, name, strict, limits
        self.count = 0
        #: The last fault of a replaced policy; empty while the policy is in use.
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

    def contain(self, method: str, *args: object) -> None:
        """Call a hook without a return value; a disabled policy is not called."""
        self.ask(method, args, nothing)

    def ask(self, method: str, args: tuple[object, ...], read: Callable[[object], T]) -> T | None:
        """Return a method's answer as ``read`` returns it; None after a fault or if disabled."""
        return self.run(method, self._answer, method, args, read)

    def declared(self, attribute: str, read: Callable[[object], T], default: T) -> T:
        """Return an attribute as ``read`` returns it; the default after a fault."""
        # A separate limiter, dropped afterwards, so that the watchdog has nothing to watch before
        # the first real call.
        limiter, self._limiter = self._limiter, TimeLimiter(self.limits)
        try:
            value = self.run(attribute, self._declared, attribute, read)
        finally:
            self._limiter = limiter
        return default if value is None else value

    def run(self, method: str, function: Callable[..., T], *args: object) -> T | None:
        """Call a function that runs the policy's code; return None after a fault or if disabled."""
        if self.count >= self.limits.strikes:
            return None
        limiter = self._limiter
        try:
            answer: T | Fault = limiter.call(contained, (function, args, self.strict))
        except HardLimitExceeded:
            self.note(method, Fault(f"took more than {self.limits.hard_s:g} s"))
            return None
        if isinstance(answer, Fault):
            self.note(method, answer)
            return None
        if limiter.slow >= self.limits.strikes and not self._reported_slow:
            self._reported_slow = True
            logger.warning(
                "%s policy %r: %d calls worked for more than %g ms, most recently %s "
                "(reported once)",
                *(self.kind, self.name, limiter.slow, self.limits.soft_s * 1e3, method),
            )
        return answer

    def _declared(self, attribute: str, read: Callable[[object], T]) -> T:
        return read(getattr(self._policy, attribute))

    def _answer(self, method: str, args: tuple[object, ...], read: Callable[[object], T]) -> T:
        # The answer is also destroyed here, so that its ``__del__`` runs within the timed call.
        return read(getattr(self._policy, method)(*args))

    def note(self, method: str, fault: Fault) -> None:
        """Count and log a fault of ``method``, or raise PolicyFaultError if strict."""
        # ``line`` sanitises text that the policy returned or raised.
        said = f"{method} {line(fault.said, limit=2 * LIMIT)}"
        what = f"{self.kind} policy {self.name!r}: {said}"
        if self.strict:
            contain = "contain it with --contain, or in an engine with strict_policies: false"
            fix = join(fault.fix, "correct the policy", contain)
            raise PolicyFaultError(what, where=fault.where, fix=fix) from fault.cause
        self.count += 1
        if method not in self._reported:
            self._reported.add(method)
            what = join(what, fault.where, fault.fix)
            logger.warning("%s; this call falls back to the default (reported once)", what)
        if self.count == self.limits.strikes:
            self.replaced = said
            logger.warning(
                "%s policy %r is replaced after %d faults", self.kind, self.name, self.count
            )


def _place(error: BaseException) -> str:
    """Return ``file:line`` of the policy's code that raised an exception; empty if there is none.

    This is the innermost line in the folder of the called method, not in a library that the method
    calls.
    """
    trace = traceback.walk_tb(traceback_of(error))
    frames = [(frame.f_code.co_filename, at) for frame, at in trace]
    outside = [frame for frame in frames if Path(frame[0]).parent != Path(__file__).parent]
    if not outside:
        return ""
    folder = Path(outside[0][0]).parent
    file, at = next(frame for frame in reversed(outside) if Path(frame[0]).parent == folder)
    return line(f"{file}:{at}")


def suggestion(error: BaseException) -> str:
    """Return the hint ``did you mean``, which Python shows only for uncaught exceptions."""
    try:
        if not isinstance(error, AttributeError | NameError) or type(error.name) is not str:
            return ""
        if isinstance(error, AttributeError):
            known = dir(error.obj)
        else:
            frame = list(traceback.walk_tb(traceback_of(error)))[-1][0]
            known = [*frame.f_locals, *frame.f_globals, *dir(builtins)]
        return line(meant(error.name, known))
    except BaseException as failure:  # the attributes of the policy's object cannot be listed
        if interrupts(failure):
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
        """The last fault if the policy was disabled for good; empty while the policy is in use."""
        return self._faults.replaced

    @property
    def limits(self) -> Limits:
        return self._faults.limits

    @property
    def slow(self) -> int:
        """Number of calls so far that returned, but ran longer than the soft limit."""
        return self._faults.slow
