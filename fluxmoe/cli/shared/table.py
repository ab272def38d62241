"""Tables for terminals: constant columns are printed once; text is folded, numbers are not.

A table that is wider than the terminal is split into several tables, each with the columns that
identify the rows. A table with a single row is printed as a list. In a pipe, nothing is folded.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from fluxmoe.cli.shared import output

#: Minimum width of a text column, unless its text is shorter.
_TEXT = 14
#: Width of the frame and the padding between cells (``│ cell │``), and of the frame at one edge.
_BETWEEN, _EDGE = 3, 1


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    cells: list[str]
    number: bool

    @property
    def natural(self) -> int:
        """Width without folding."""
        return max(map(len, (self.heading, *self.cells)))

    @property
    def least(self) -> int:
        """Minimum width, with headings folded between words."""
        words = max(map(len, self.heading.split()), default=0)
        cells = max(map(len, self.cells), default=0)
        return max(words, cells if self.number else min(cells, _TEXT))

    @property
    def constant(self) -> bool:
        """True if the column has a heading and the same cell in all rows."""
        return bool(self.heading) and len(set(self.cells)) == 1


def show(
    title: str,
    text: Sequence[str],
    numbers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    keys: int | None = None,
    total: bool = False,
    merge: bool = True,
) -> None:
    """Print a table on standard output.

    Args:
        title: Line above the table; may be empty.
        text, numbers: Headings of the text columns and of the numeric columns, which follow.
        rows: Cells of each row.
        keys: Number of leading columns that identify the rows; default: all text columns.
        total: True if the last row is the total of the others.
        merge: Print the value of each constant column once, above the table.
    """
    columns = [
        _Column(heading, [row[at] for row in rows], at >= len(text))
        for at, heading in enumerate((*text, *numbers))
    ]
    first = columns[: len(text) if keys is None else keys]
    if title:
        output.say(title, style="bold")
    if len(rows) == 1:
        _print_list(columns)
        return
    once = [column for column in columns if merge and column.constant]
    said = [f"{column.heading} {column.cells[0]}" for column in once if column.cells[0]]
    if said:
        output.say(f"in every row: {', '.join(said)}", style="dim")
    varying = [column for column in columns if column not in once]
    for block in _blocks(
        [column for column in first if column in varying],
        [column for column in varying if column not in first],
        output.console().width,
    ):
        _print(block, total)


def _blocks(keys: list[_Column], others: list[_Column], width: int) -> list[list[_Column]]:
    """Split columns into a few tables of similar width, each of which begins with ``keys``."""
    parts = [list[_Column]()]
    for column in others:
        if parts[-1] and _width([*keys, *parts[-1], column]) > width:
            parts.append([])
        parts[-1].append(column)
    each = -(-len(others) // len(parts))
    even = [others[first : first + each] for first in range(0, len(others), each or 1)]
    if all(_width([*keys, *part]) <= width for part in even):
        parts = even or parts
    return [[*keys, *part] for part in parts]


def _width(columns: Sequence[_Column]) -> int:
    return sum(column.least + _BETWEEN for column in columns) + _EDGE


def _print_list(columns: Sequence[_Column]) -> None:
    from rich.table import Table
    from rich.text import Text

    listed = Table(show_header=False)
    for column in columns:
        if column.cells[0]:
            listed.add_row(Text(column.heading), Text(column.cells[0], overflow="fold"))
    output.console().print(listed)


def _print(columns: Sequence[_Column], total: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    # If even a single block is wider than the terminal, its lines wrap: nothing is truncated.
    console = output.console(least=_width(columns))
    roomy = sum(column.natural + _BETWEEN for column in columns) + _EDGE <= console.width
    table = Table()
    for column in columns:
        heading = column.heading
        if column.number and not roomy:
            heading = textwrap.fill(heading, column.least, break_on_hyphens=False)
        table.add_column(
            Text(heading),
            justify="right" if column.number else "left",
            no_wrap=column.number,
            overflow="fold",
        )
    cells = [column.cells for column in columns]
    for at, row in enumerate(zip(*cells, strict=True)):
        if total and at == len(cells[0]) - 1:
            table.add_section()
        table.add_row(*map(Text, row))
    console.print(table)
