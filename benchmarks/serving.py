"""Comparison of stock vLLM and FluxMoE, in cases where paging wins, costs nothing, or loses.

Both have the same budget, and FluxMoE's page store takes additional memory. If the budget does not
hold all requests at once, stock vLLM also runs with FluxMoE's total memory and without a limit.
With ``--page-files``, FluxMoE also runs within stock vLLM's total memory, with its pages in a file.

python -m benchmarks serving [--model shipped|mid] [--rounds N] [--starts N] [--only NAME …]
                             [--page-files FOLDER] [--save FILE]

Memory placement makes identical engines differ by up to 6% for their whole lifetime, so differences
of a few per cent can be resolved only with several engines of each kind (``--starts``).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine, models
from fluxmoe import sizes
from fluxmoe.demo.compare import TITLES, Comparison, DemoWorkload, compare
from fluxmoe.demo.model import DemoModel


@dataclass(frozen=True, slots=True)
class Scenario:
    """A row: a budget in sequences of stock vLLM, a number of requests, and FluxMoE's settings."""

    name: str
    #: Requests that stock vLLM's KV cache holds at this budget.
    sequences: int
    requests: int
    fluxmoe: dict[str, Any]
    #: True if every run begins without resident pages and therefore loads every page that it uses.
    cold: bool = True


def scenarios(model: DemoModel) -> list[Scenario]:
    total = model.experts_total_bytes
    few = {"memory": {"experts": {"target": total // 4}}}
    rows = [
        Scenario(f"starved: stock holds {n}, {policy}", n, 64, {"eviction": policy})
        for n, policy in ((2, "next-use"), (3, "next-use"), (4, "next-use"), (3, "lru"))
    ]
    rows += [Scenario(f"all fits, batch {n}", 64, n, {}, cold=False) for n in (1, 8, 64)]
    rows += [
        Scenario(f"all fits, marginal, batch {n}", 64, n, {"arbitration": "marginal"}, cold=False)
        for n in (1, 8, 64)
    ]
    rows += [Scenario("all fits, cold, batch 8", 64, 8, {})]
    rows += [Scenario(f"1/4 of the experts in slots, batch {n}", 64, n, few) for n in (1, 8, 64)]
    return rows


def run(model: DemoModel, scenario: Scenario, rounds: int, page_files: Path | None) -> Comparison:
    # Small batches take little time; more tokens and rounds make their medians meaningful.
    small = scenario.requests <= 8
    return compare(
        model,
        DemoWorkload(scenario.requests, output_tokens=100 if small else 64),
        sequences=scenario.sequences,
        fluxmoe={"copy_threads": 0, **scenario.fluxmoe},
        rounds=rounds * 3 if small else rounds,
        options=model.options(max_num_seqs=64),
        page_files=page_files,
        cold=scenario.cold,
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("serving", description=__doc__.partition("\n")[0])
    models.add_option(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=1, help="number of engines of each kind")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names to run")
    parser.add_argument("--page-files", type=Path, help="folder on a disk for page files")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args(argv)
    table = Table(title="stock vLLM and FluxMoE (medians, one thread, eager)")
    for column in ("scenario", "engine", "total", "PSS", "tok/s", "ratio", "in slots", "hits"):
        table.add_column(column, justify="left" if column in ("scenario", "engine") else "right")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        model = models.get(arguments.model, Path(scratch))
        for scenario in scenarios(model):
            if arguments.only and not any(part in scenario.name for part in arguments.only):
                continue
            starts = [
                run(model, scenario, arguments.rounds, arguments.page_files)
                for _ in range(arguments.starts)
            ]
            results.append(
                {
                    "scenario": scenario.name,
                    "speedup": round(median(outcome.speedup() for outcome in starts), 3),
                    "starts": [outcome.to_json() for outcome in starts],
                }
            )
            show(table, scenario.name, starts)
    Console().print(table)
    if arguments.save:
        machine.save(arguments.save, results)


def show(table: Table, scenario: str, starts: list[Comparison]) -> None:
    """Add a row for each engine of a scenario."""
    same = all(outcome.tokens_identical for outcome in starts)
    table.add_section()
    for name in starts[-1].sides:
        sides = [outcome.sides[name] for outcome in starts]
        stats = sides[-1].stats
        table.add_row(
            scenario if same else f"{scenario}: TOKENS DIFFER",
            TITLES[name],
            sizes.shown(sides[-1].total_bytes),
            sizes.shown(int(median(side.pss_bytes for side in sides))),
            f"{median(side.tokens_per_s for side in sides):.0f}",
            f"{median(outcome.speedup(name) for outcome in starts):.2f}×",
            f"{stats['slots'] / stats['pages']:.0%}" if stats else "",
            f"{stats['hit_rate']:.1%}" if stats else "",
        )
