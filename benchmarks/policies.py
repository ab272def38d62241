"""Misses of eviction policies relative to those of the best simple policy and of the optimum.

    python -m benchmarks policies [--seeds 11,12] [--policy P,…] [--json] [--save FILE]

The traces are the shipped ones, synthetic decode at batch sizes 1, 8 and 64 (with constant or
changing popularity, with and without locality), cyclic scans, and decode with occasional scans.
Each trace is replayed at eight capacities, except those below its largest event. The results per
trace and policy are:

* *worst*: ratio of the misses to those of the best of lru, lfu and lfru, at the capacity where this
  ratio is largest;
* *mean*: geometric mean of that ratio over the capacities;
* *over*: number of capacities at which that ratio is above 1.01;
* *gap closed*: share of LRU's excess misses over Belady that the policy saves (median over
  capacities).

Nothing is timed: the results are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from fluxmoe import plugins
from fluxmoe.sim.capacity import pages_of
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import shipped
from fluxmoe.trace.synth import Workload, write

CAPACITIES = ("15%", "20%", "25%", "37.5%", "50%", "62.5%", "75%", "87.5%")
SIMPLE, BOUND = ("lru", "lfu", "lfru"), 1.01
#: Tokens per step → number of steps.
DECODE = {1: 600, 8: 300, 64: 120}
LAYERS, EXPERTS, TOP_K = 8, 64, 4


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("policies", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="11,12", help="seeds of the synthetic traces")
    parser.add_argument("--policy", default="next-use,s3-fifo", help="policies to judge")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write results as JSON")
    arguments = parser.parse_args(argv)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = [row for name, events in traces(seeds) for row in judge(name, events, arguments.policy)]
    if arguments.save:
        machine.save(arguments.save, rows)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)


def traces(seeds: list[int]) -> Iterator[tuple[str, Events]]:
    for name in shipped.NAMES:
        yield name, Events.load(shipped.path(name))
    for seed in seeds:
        for name, workload in workloads(seed).items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.parquet"
                write(workload, path)
                yield f"{name}, seed {seed}", Events.load(path)


def workloads(seed: int) -> dict[str, Workload]:
    found = {}
    for batch, steps in DECODE.items():
        for drift in (0.0, 0.02, 0.1, 0.3):
            for locality in ((0.0, 0.0), (0.6, 0.2)):
                name = f"batch {batch}, drift {drift:g}" + (", local" if any(locality) else "")
                found[name] = Workload(
                    LAYERS, EXPERTS, TOP_K, steps, batch, seed, drift=drift, locality=locality
                )
    found["cyclic scan"] = Workload(LAYERS, EXPERTS, EXPERTS, 60, 1, seed)
    found["batch 4 and scans"] = Workload(LAYERS, EXPERTS, TOP_K, 300, 4, seed, scan_every=20)
    return found


def judge(name: str, events: Events, policies: str) -> Iterator[dict[str, Any]]:
    """Compute one row per policy."""
    registry = plugins.load()
    capacities = [c for c in CAPACITIES if pages_of(c, events.meta) >= events.largest]

    def misses(policy: str) -> list[int]:
        runs = (simulate(events, policy, c, registry=registry) for c in capacities)
        return [run.misses for run in runs]

    known = {policy: misses(policy) for policy in (*SIMPLE, "belady")}
    best = [min(each) for each in zip(*(known[policy] for policy in SIMPLE), strict=True)]
    for policy in policies.split(","):
        mine = misses(policy)
        ratio = [m / b for m, b in zip(mine, best, strict=True)]
        closed = [
            (lru - m) / (lru - least)
            for m, lru, least in zip(mine, known["lru"], known["belady"], strict=True)
            if lru > least
        ]
        yield {
            "trace": name,
            "policy": policy,
            "capacities": len(capacities),
            "worst": round(max(ratio), 4),
            "worst_at": capacities[ratio.index(max(ratio))],
            "over": sum(each > BOUND for each in ratio),
            "mean": round(statistics.geometric_mean(ratio), 4),
            "gap_closed": round(statistics.median(closed), 4) if closed else None,
            "misses": dict(zip(capacities, mine, strict=True)),
        }


def show(rows: list[dict[str, Any]]) -> None:
    console = Console(width=100)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        table = Table(
            title=f"{policy} against the best of {', '.join(SIMPLE)}", title_justify="left"
        )
        table.add_column("trace")
        for column in ("mean", "worst", "at", "over", "gap closed"):
            table.add_column(column, justify="right")
        mine = [row for row in rows if row["policy"] == policy]
        for row in mine:
            closed = row["gap_closed"]
            table.add_row(
                row["trace"], f"{row['mean']:.3f}", f"{row['worst']:.3f}", row["worst_at"],
                f"{row['over']} of {row['capacities']}", "–" if closed is None else f"{closed:.0%}",
            )  # fmt: skip
        console.print(table)
        gaps = [row["gap_closed"] for row in mine if row["gap_closed"] is not None]
        over, all_ = sum(row["over"] for row in mine), sum(row["capacities"] for row in mine)
        mean = statistics.geometric_mean([row["mean"] for row in mine])
        console.print(
            f"{policy}: {over} of {all_} above {BOUND}, mean {mean:.4f}, "
            f"gap closed on the median trace {statistics.median(gaps):.1%}\n"
        )
