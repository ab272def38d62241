"""Results of independent checks, collected so that users see all problems at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fluxmoe.errors import FluxMoEError, together


class Findings:
    """Errors and notes collected from independent checks.

    Attributes:
        errors: Problems that would make a start fail.
        notes: Remarks that do not prevent a start; each is one sentence.
    """

    def __init__(self) -> None:
        self.errors: list[FluxMoEError] = []
        self.notes: list[str] = []

    @contextmanager
    def check(self) -> Iterator[None]:
        """Return a context that records a FluxMoE error raised inside it instead of raising it."""
        try:
            yield
        except FluxMoEError as error:
            self.errors += error.problems()

    def extend(self, others: Findings) -> None:
        """Append other findings."""
        self.errors += others.errors
        self.notes += others.notes

    def require(self) -> None:
        """Raise the collected errors as one (``errors.together``), if there are any."""
        if self.errors:
            raise together(self.errors)
