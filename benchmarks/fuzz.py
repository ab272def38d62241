"""Counts of the fuzzer: operations compared with the model, faults by site, and leaks.

    python -m benchmarks fuzz [--runs N] [--ops N] [--seed N] [--save FILE]

Nothing is timed. By default, the runs of one engine are those of ``make test-full``
(docs/project/testing.md). On a failure, the output ends with the command that replays it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from tests.core.rig import Leaks
from tests.fuzz.driver import Failure, fuzz, together
from tests.fuzz.sites import SITES, fail_everywhere

ENGINES = 6


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run")
    parser.add_argument("--runs", type=int, default=200, help="number of runs, one seed each")
    parser.add_argument("--ops", type=int, default=5000, help="operations per run")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write results as JSON")
    arguments = parser.parse_args(argv)
    logging.disable()  # otherwise, many faulty policies would be reported
    try:
        results = measure(arguments.seed, arguments.runs, arguments.ops)
    except Failure as failure:
        sys.exit(f"{failure}")
    finally:
        logging.disable(logging.NOTSET)
    show(results)
    if arguments.save:
        machine.save(arguments.save, results)


def measure(seed: int, runs: int, operations: int) -> dict[str, Any]:
    leaks = Leaks()
    alone = fuzz(range(seed, seed + runs), operations)
    beside = together(range(seed, seed + ENGINES), operations)
    sites = {}
    for site in SITES:
        outcome = fail_everywhere(site, runs=4, operations=400, most=24)
        sites[site] = {
            "injected": outcome.injected,
            "raised": dict(outcome.errors),
            "operations": outcome.operations,
        }
    total = alone.operations + beside.operations + sum(s["operations"] for s in sites.values())
    return {
        "seeds": [seed, seed + runs - 1],
        "operations": total,
        "mismatches": 0,  # the first one ends the command
        "leaks": leaks.found(),
        "alone": _figures(alone),
        "at_once": {"engines": ENGINES, **_figures(beside)},
        "sites": sites,
    }


def _figures(tally: Any) -> dict[str, Any]:
    return {
        "operations": tally.operations,
        "calls": dict(tally.calls),
        "faults": dict(tally.faults),
        "raised": dict(tally.errors),
    }


def show(results: dict[str, Any]) -> None:
    console = Console(width=100)
    alone, at_once = results["alone"], results["at_once"]
    console.print(f"seeds {results['seeds'][0]}…{results['seeds'][1]}")
    console.print(f"operations: {results['operations']}, mismatches: {results['mismatches']}")
    console.print(f"  one engine: {alone['operations']}, calls {alone['calls']}")
    console.print(f"  {ENGINES} engines at once: {at_once['operations']}")
    console.print(f"leaks: {sum(results['leaks'].values())} {results['leaks']}")
    console.print(f"faults at random: {alone['faults']}, raised {alone['raised']}")
    table = Table(title="every site failed in turn", title_justify="left")
    for column in ("site", "faults", "raised", "went on without an error"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name, site in results["sites"].items():
        raised = " ".join(f"{code}×{n}" for code, n in site["raised"].items())
        lived = site["injected"] - sum(site["raised"].values())
        table.add_row(name, str(site["injected"]), raised, str(lived))
    console.print(table)
