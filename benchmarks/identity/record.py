"""Results on disk: JSON lines, the machine first, then a line per cell, so a run can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine
from benchmarks.identity.cells import Cell
from benchmarks.identity.limits import Found
from benchmarks.identity.outcome import Outcome

RESULTS = Path(__file__).parents[1] / "results" / "identity"


def as_row(part: Cell | Outcome) -> dict[str, object]:
    """A cell or an outcome as plain data."""
    return asdict(part)


def load(path: Path) -> dict[Cell, Outcome]:
    """The cells of a file; none if there is no such file."""
    if not path.exists():
        return {}
    _, *lines = path.read_text().splitlines()
    rows = map(json.loads, lines)
    return {Cell(**row["cell"]): Outcome(**row["outcome"]) for row in rows}


def append(path: Path, cell: Cell, outcome: Outcome) -> None:
    """Add a line; a new file gets the machine's before it."""
    _line(path, {"cell": as_row(cell), "outcome": as_row(outcome)})


def committed() -> dict[Cell, Outcome]:
    """All cells of the results in the repository."""
    return {
        cell: outcome
        for path in sorted(RESULTS.glob("*.jsonl"))
        if path != RESULTS / "limits.jsonl"
        for cell, outcome in load(path).items()
    }


def save_limit(path: Path, found: Found) -> None:
    """Add what became of a trial."""
    _line(path, asdict(found))


def limits() -> Iterator[Found]:
    """The trials in the repository's results."""
    _, *lines = (RESULTS / "limits.jsonl").read_text().splitlines()
    yield from (Found(**json.loads(line)) for line in lines)


def _line(path: Path, row: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a") as file:
        if new:
            print(json.dumps({"machine": machine.describe()}), file=file)
        print(json.dumps(row, separators=(",", ":")), file=file)
