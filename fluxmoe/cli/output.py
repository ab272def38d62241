"""Output of commands: tables for people, pure JSON for programs, errors on standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from fluxmoe.errors import FluxMoEError, SeveralErrors

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
    """Print ``error[FMxxx]: what; where; what to do`` on standard error, one line per error."""
    for each in error.errors if isinstance(error, SeveralErrors) else [error]:
        print(f"error[{each.code}]: {each}", file=sys.stderr)


def nbytes(size: float) -> str:
    """A size in bytes for display: 1536 → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def exact_size(size: int) -> int | str:
    """An exact size as a configuration would write it: 1536 → ``1536``, 2048 → ``2KiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return int(size)
