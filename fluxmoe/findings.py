"""Results of independent checks, so that users see all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from fluxmoe.errors import FluxMoEError, together

_Arguments = ParamSpec("_Arguments")
_Value = TypeVar("_Value")


class Findings:
    """Errors and notes collected from independent checks.

    Attributes:
        errors: Problems that would make a start fail.
        notes: Remarks that do not prevent a start, each one sentence.
        wrong: Names of settings with errors, whose values later checks must not rely on.
    """

    def __init__(self) -> None:
        self.errors: list[FluxMoEError] = []
        self.notes: list[str] = []
        self.wrong: set[str] = set()

    @contextmanager
    def check(self) -> Iterator[None]:
        """Return a context that records a FluxMoE error raised in it and continues after it."""
        try:
            yield
        except FluxMoEError as error:
            self.errors += error.problems()

    def result(
        self,
        call: Callable[_Arguments, _Value],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Value | None:
        """Return the result of a call; None if it raises a FluxMoE error, which is recorded."""
        try:
            return call(*args, **kwargs)
        except FluxMoEError as error:
            self.errors += error.problems()
            return None

    def reliable(self, *settings: str) -> bool:
        """True if none of these settings is known to be wrong."""
        return self.wrong.isdisjoint(settings)

    def require(self) -> None:
        """Raise the collected errors as one (``errors.together``), if any."""
        if self.errors:
            raise together(self.errors)
