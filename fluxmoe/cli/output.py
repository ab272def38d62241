"""Output of commands: tables for people, pure JSON for programs, errors on standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from fluxmoe.errors import FluxMoEError

if TYPE_CHECKING:
    from rich.console import Console

#: Columns of a table in a pipe or a log file, where rich would assume 80.
_PIPE_WIDTH = 180


def console() -> Console:
    """A console on standard output, for tables."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def print_json(data: object) -> None:
    """Write ``data`` as JSON only; not through rich, which would wrap long lines."""
    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_error(error: FluxMoEError) -> None:
    """Print ``error[FMxxx]: what; where; what to do`` on standard error, a line per problem."""
    for each in error.problems():
        print(f"error[{each.code}]: {each.text}", file=sys.stderr)
