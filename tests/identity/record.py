"""Results on disk: JSON lines for the machine and for each cell, so that runs can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from tests.identity.cells import Cell
from tests.identity.limits import Found
from tests.identity.outcome import Outcome

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "identity"


def as_row(part: Cell | Outcome) -> dict[str, object]:
    """Convert a cell or an outcome to plain data."""
    return asdict(part)


def load(path: Path) -> dict[Cell, Outcome]:
    """Load the outcomes of a file's cells; a missing file gives an empty dictionary."""
    if not path.exists():
        return {}
    return {Cell(**row["cell"]): Outcome(**row["outcome"]) for row in _rows(path)}


def begin(path: Path) -> None:
    """Record the machine and the commit of the following lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _line(path, {"machine": machine.describe()})


def append(path: Path, cell: Cell, outcome: Outcome) -> None:
    """Append the outcome of a cell."""
    _line(path, {"cell": as_row(cell), "outcome": as_row(outcome)})


def committed() -> dict[Cell, Outcome]:
    """Load all cells of the results in the repository."""
    return {
        cell: outcome
        for path in sorted(RESULTS.glob("*.jsonl"))
        if path != RESULTS / "limits.jsonl"
        for cell, outcome in load(path).items()
    }


def save_limit(path: Path, found: Found) -> None:
    """Append the result of a trial."""
    _line(path, asdict(found))


def limits() -> Iterator[Found]:
    """Load the trials in the repository's results."""
    yield from (Found(**row) for row in _rows(RESULTS / "limits.jsonl"))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    rows = map(json.loads, path.read_text().splitlines())
    yield from (row for row in rows if "machine" not in row)


def _line(path: Path, row: dict[str, object]) -> None:
    with path.open("a") as file:
        print(json.dumps(row, separators=(",", ":")), file=file)
