"""Access to the GPU, timing of work on the GPU, and output of results."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from fluxmoe.errors import UnsupportedError


def require() -> torch.device:
    """Get the current CUDA device.

    Raises:
        UnsupportedError: There is no CUDA device that torch can use.
    """
    if not torch.cuda.is_available():
        build = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        raise UnsupportedError(
            f"this experiment needs a GPU, and torch {torch.__version__} {build}",
            fix="run it on the GPU machine (docs/concepts/kernels.md)",
        )
    return torch.device("cuda", torch.cuda.current_device())


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to host memory that the device can read."""
    return tensor.pin_memory()


def describe() -> dict[str, Any]:
    """Describe the GPU, the driver and the machine."""
    properties = torch.cuda.get_device_properties(require())
    return machine.describe() | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def arguments(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options common to all experiments."""
    parser = argparse.ArgumentParser(f"gpu {name}", description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write results as JSON")
    return parser


def report(options: argparse.Namespace, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table or JSON, and save the results if requested."""
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": describe(), "results": rows}, indent=2)
        options.save.write_text(text + "\n")
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show(title, rows)


def show(title: str, rows: list[dict[str, Any]], width: int = 200) -> None:
    """Print a table with a column per key, in the order of the first row."""
    table = Table(title=title, title_justify="left")
    columns = list(rows[0]) if rows else []
    for column in columns:
        number = isinstance(rows[0][column], int | float)
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(cell(row[column]) for column in columns))
    Console(width=width).print(table)


def cell(value: Any) -> str:
    """Format a value for the table: floats with four digits, unknown values as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Timer:
    """A timer of single calls on the device, in µs, each with a cold L2 cache."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=require())

    def __call__(self, work: Callable[[], object]) -> float:
        """Return the median time over the repeats. ``work`` must not wait for the host."""
        for _ in range(3):
            work()
        events = []
        for _ in range(self.repeats):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in events)
