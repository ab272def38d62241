"""Collection of independent checks, so that a user sees all problems at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fluxmoe.errors import FluxMoEError, together


class Findings:
    """Errors and notes of checks that do not stop one another.

    Attributes:
        errors: Problems that would make a start fail.
        notes: Remarks that do not prevent a start, each one sentence.
    """

    def __init__(self) -> None:
        self.errors: list[FluxMoEError] = []
        self.notes: list[str] = []

    @contextmanager
    def check(self) -> Iterator[None]:
        """A context that records an error of FluxMoE raised in it, and goes on behind it."""
        try:
            yield
        except FluxMoEError as error:
            self.errors += error.problems()

    def extend(self, others: Findings) -> None:
        """Append the findings of other checks."""
        self.errors += others.errors
        self.notes += others.notes

    def require(self) -> None:
        """Raise the errors found as one (``errors.together``); nothing if there is none."""
        if self.errors:
            raise together(self.errors)
