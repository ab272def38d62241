"""Faults of policies: counted, logged once, and contained or raised.

A policy that raises, takes too long or returns an invalid answer commits a fault. That call falls
back to the default; after ``strikes`` faults the policy is disabled for good. ``strict`` raises
instead.

All of a policy's code runs within a timed call: its methods, the lookup of a method, the reading of
an answer (``answers``), the printing of what it raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fluxmoe.core.policy.answers import InvalidAnswer, nothing
from fluxmoe.core.policy.watchdog import HardLimitExceeded, Limits, TimeLimiter
from fluxmoe.errors import PolicyFaultError
from fluxmoe.words import LIMIT, interrupts, line, raised

logger = logging.getLogger("fluxmoe")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure of a policy: the words for it, and the exception if that is to be raised."""

    said: str
    cause: BaseException | None = None


def contained(function: Callable[..., T], *args: object, keep: bool = True) -> T | Fault:
    """Call ``function``; whatever it raises becomes a ``Fault``, with the exception if ``keep``.

    ``HardLimitExceeded`` passes through, as do Ctrl-C and exceptions from signal handlers.
    """
    try:
        return function(*args)
    except InvalidAnswer as refused:
        return Fault(str(refused))
    except HardLimitExceeded:
        raise
    except BaseException as error:  # sys.exit() in a policy must not end the engine
        if interrupts(error):
            raise
        return Fault(f"raised {raised(error)}", error if keep else None)


class PolicyCaller:
    """Calls one policy, counts its faults and contains or raises them."""

    def __init__(
        self, policy: object, kind: str, name: str, *, strict: bool, limits: Limits
    ) -> None:
        self._policy = policy
        self.kind, self.name, self.strict, self.limits = kind, name, strict, limits
        self.count = 0
        self._limiter = TimeLimiter(limits)
        self._contained = partial(contained, keep=strict)
        self._reported: set[str] = set()
        self._reported_slow = False

    @property
    def out(self) -> bool:
        return self.count >= self.limits.strikes

    @property
    def slow(self) -> int:
        return self._limiter.slow

    def contain(self, method: str, *args: object) -> None:
        """Call a hook, which returns nothing; a disabled policy is not called."""
        self.ask(method, args, nothing)

    def ask(self, method: str, args: tuple[object, ...], read: Callable[[object], T]) -> T | None:
        """The answer of a method as ``read`` returns it; None after a fault or if disabled."""
        return self.run(method, self._answer, method, args, read)

    def declared(self, attribute: str, read: Callable[[object], T], default: T) -> T:
        """An attribute as ``read`` returns it, or the default after a fault."""
        # A stopwatch of its own: while only declarations are read, no thread need watch.
        limiter, self._limiter = self._limiter, TimeLimiter(self.limits)
        try:
            value = self.run(attribute, self._declared, attribute, read)
        finally:
            self._limiter = limiter
        return default if value is None else value

    def run(self, method: str, function: Callable[..., T], *args: object) -> T | None:
        """Call a function that runs code of the policy; None after a fault or if disabled."""
        if self.count >= self.limits.strikes:
            return None
        limiter = self._limiter
        try:
            answer: T | Fault = limiter.call(self._contained, (function, *args))
        except HardLimitExceeded:
            self.note(method, f"took more than {self.limits.hard_s:g} s")
            return None
        if isinstance(answer, Fault):
            self.note(method, answer.said, answer.cause)
            return None
        # One slow call may be the machine's fault; ``strikes`` of them are the policy's.
        if limiter.slow >= self.limits.strikes and not self._reported_slow:
            self._reported_slow = True
            logger.warning(
                "%s policy %r: %d calls took more than %g ms, the last one of %s (reported once)",
                *(self.kind, self.name, limiter.slow, self.limits.soft_s * 1e3, method),
            )
        return answer

    def _declared(self, attribute: str, read: Callable[[object], T]) -> T:
        return read(getattr(self._policy, attribute))

    def _answer(self, method: str, args: tuple[object, ...], read: Callable[[object], T]) -> T:
        # The answer ends here as well: its ``__del__`` belongs to the call.
        return read(getattr(self._policy, method)(*args))

    def note(self, method: str, said: str, cause: BaseException | None = None) -> None:
        """Count a fault of ``method``; raises PolicyFaultError if strict."""
        what = f"{self.kind} policy {self.name!r}: {method} {line(said, limit=2 * LIMIT)}"
        if self.strict:
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
    """Properties of the policy common to all guards."""

    def __init__(self, faults: PolicyCaller) -> None:
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
        """Calls so far that returned, but took longer than the soft limit."""
        return self._faults.slow
