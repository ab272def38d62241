"""Output of commands: text for users, JSON or CSV for programs, errors on standard error."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, TextIO

from fluxmoe.errors import ConfigError, FluxMoEError

if TYPE_CHECKING:
    from rich.console import Console

#: Line width in a pipe or a file: text need not fold there, but rich would assume 80 columns.
UNLIMITED = 1 << 16

#: Write errors that are not the program's fault.
LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)

#: The stream for JSON and CSV while standard output is reserved for them.
_reserved: ContextVar[TextIO | None] = ContextVar("reserved", default=None)


def prepare() -> None:
    """Make the standard streams accept any text.

    A stream escapes characters that it cannot encode; a closed stream (``>&-``) discards the text.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def lost(error: OSError) -> ConfigError:
    """Make the error for output that cannot be written, and discard the rest of the output."""
    sys.stdout = _nowhere()
    return ConfigError(
        f"the output is incomplete: {error.strerror}",
        where="standard output",
        fix="write to another file or disk",
    )


def _nowhere() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


@contextmanager
def reserved() -> Iterator[None]:
    """Reserve standard output for ``printed``; all other output goes to standard error.

    Plugins and libraries may also print: during import, from C code, and in child processes.
    """
    shared = sys.stdout
    try:
        whole_process = shared.fileno() == 1
    except OSError:  # not a file: a caller in this process captures the output
        whole_process = False
    if not whole_process:
        token = _reserved.set(shared)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _reserved.reset(token)
        return
    shared.flush()
    own = os.fdopen(os.dup(1), "w", encoding=shared.encoding, errors=shared.errors)
    os.dup2(2, 1)
    token = _reserved.set(own)
    try:
        yield
    finally:
        _reserved.reset(token)
        with suppress(OSError):  # the reader has closed the pipe
            shared.flush()
        os.dup2(own.fileno(), 1)
        with suppress(OSError):
            own.close()


def printed(
    as_json: bool, as_csv: bool, whole: object, rows: Iterable[Mapping[str, object]]
) -> bool:
    """Print machine-readable output, if requested.

    Args:
        as_json: True to print ``whole`` as JSON.
        as_csv: True to print ``rows`` as CSV. Rows may lack columns; cells that are lists or
            mappings are printed as JSON.

    Returns:
        True if JSON or CSV was requested.
    """
    if as_json:
        print_json(whole)
    elif as_csv:
        _print_csv(list(rows))
    return as_json or as_csv


def print_json(data: object) -> None:
    """Print ``data`` as JSON, without rich, which would wrap long lines."""
    out = _reserved.get() or sys.stdout
    json.dump(data, out, indent=2)
    out.write("\n")
    out.flush()


def _print_csv(rows: list[Mapping[str, object]]) -> None:
    out = _reserved.get() or sys.stdout
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                column: json.dumps(cell) if isinstance(cell, list | dict) else cell
                for column, cell in row.items()
            }
        )
    out.flush()


def console(least: int = 0) -> Console:
    """Make a console for standard output, as wide as the terminal but at least ``least`` columns.

    Text is shown unchanged, because names of policies and files are not markup.
    """
    from rich.console import Console

    plain = partial(Console, markup=False, emoji=False)
    if not sys.stdout.isatty():
        return plain(width=UNLIMITED)
    found = plain()
    return found if found.width >= least else plain(width=least)


def say(text: str, *, style: str | None = None) -> None:
    """Print text, folded between words to the terminal's width."""
    console().print(text, style=style, highlight=False)


def warn(text: str) -> None:
    """Print a note on standard error, so that standard output holds only JSON or CSV."""
    print(f"note: {text}", file=sys.stderr)


def print_error(error: FluxMoEError) -> None:
    """Print ``error[FMxxx]: what; where; fix`` on standard error, with one line per problem."""
    for each in error.problems():
        print(f"error[{each.code}]: {each.text}", file=sys.stderr)
