"""Simulated and measured tokens per second, compared for decode on the torch backend.

    python -m benchmarks simulated_speed [--rounds N] [--profile FILE.yaml] [--json] [--save FILE]

Each round first measures the machine (``fluxmoe doctor --measure``): steps with all experts
resident, and copies alone, but none of the compared cases. Then the shipped model decodes at each
batch size and capacity, from a cold start and always with the same tokens. The trace from the first
round is simulated at the same capacity with the current round's profile. The error is the median
over rounds, because the machine's speed changes over time. The benchmark uses one thread; run it on
an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import fluxmoe
from benchmarks import machine
from fluxmoe.backends.torch import layout
from fluxmoe.backends.torch.measure import decode, measure, room
from fluxmoe.demo.model import SHIPPED
from fluxmoe.sim import hardware
from fluxmoe.sim.simulator import simulate

BATCHES, SHARES, POLICY = (1, 4, 16), (0.25, 0.5, 0.75), "next-use"
STEPS, REPEATS, WITHIN = 64, 2, 0.15


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("simulated_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(SHIPPED), help="a checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="an existing profile to use")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write results as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    geometry, _ = layout.describe(layout.experts_of(model))
    settings = [
        Setting(batch, max(int(geometry.num_pages * share), geometry.experts_per_layer))
        for batch, share in itertools.product(BATCHES, SHARES)
    ]
    profiles = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            setting.record(model, arguments.steps, Path(folder))
        for _ in range(arguments.rounds):
            given = arguments.profile
            fresh = None if given else hardware.Profile(**measure(arguments.model))
            profiles.append(fresh or hardware.load(given))
            for setting in settings:
                setting.compare(model, profiles[-1], arguments.steps)
    rows = [setting.row(geometry.num_pages) for setting in settings]
    results = {
        "load_average": load,
        "profiles": [profile.model_dump() for profile in profiles],
        "settings": rows,
    }
    if arguments.save:
        machine.save(arguments.save, results)
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        show(rows, load)


@dataclass
class Setting:
    """One batch size and capacity."""

    batch: int
    pages: int
    trace: Path = Path()
    slots: int = 0
    hit_rate: float = 0.0
    #: Tokens per second by round.
    measured: list[float] = field(default_factory=list)
    simulated: list[float] = field(default_factory=list)

    def record(self, model: Any, steps: int, folder: Path) -> None:
        """Record the routing, which is the same in every run."""
        self.trace = folder / f"{self.batch}-{self.pages}.parquet"
        with self._paged(model) as handle:
            _decode(model, handle, self.batch, steps, self.trace)
            self.slots, self.hit_rate = handle.stats()["slots"], handle.stats()["hit_rate"]

    def compare(self, model: Any, profile: hardware.Profile, steps: int) -> None:
        """Measure and simulate one round."""
        with self._paged(model) as handle:
            seconds = min(_decode(model, handle, self.batch, steps) for _ in range(REPEATS))
        result = simulate(self.trace, POLICY, self.slots, hardware=profile)
        assert result.timing is not None
        assert abs(result.hit_rate - self.hit_rate) < 1e-12, "the hit rates differ"
        self.measured.append(self.batch * steps / seconds)
        self.simulated.append(result.timing.tokens_per_s)

    def row(self, pages: int) -> dict[str, Any]:
        errors = [s / m - 1 for s, m in zip(self.simulated, self.measured, strict=True)]
        return {
            "batch": self.batch,
            "slots": self.slots,
            "pages": pages,
            "hit_rate": round(self.hit_rate, 4),
            "measured_tokens_per_s": round(statistics.median(self.measured), 1),
            "simulated_tokens_per_s": round(statistics.median(self.simulated), 1),
            "error": round(statistics.median(errors), 4),
            "errors": [round(error, 4) for error in errors],
        }

    def _paged(self, model: Any) -> Any:
        return fluxmoe.page(model, room(model, self.pages), eviction=POLICY)


def _decode(model: Any, handle: Any, batch: int, steps: int, record: Path | None = None) -> float:
    """Time ``steps`` steps from a cold start, in seconds, without the prefill, or record them."""
    run = decode(model, batch, steps)
    next(run)
    handle.reset()
    if record is not None:
        with handle.record(record):
            for _ in run:
                pass
        return 0.0
    started = time.perf_counter()
    for _ in run:
        pass
    return time.perf_counter() - started


def show(rows: list[dict[str, Any]], load: float) -> None:
    table = Table(
        *("batch", "slots", "hit rate", "measured tok/s", "simulated tok/s", "error"),
        title=f"torch backend, {POLICY}, one thread; load average {load:.1f}",
        title_justify="left",
    )
    for row in rows:
        table.add_row(
            str(row["batch"]),
            f"{row['slots']} of {row['pages']}",
            f"{row['hit_rate']:.1%}",
            f"{row['measured_tokens_per_s']:.1f}",
            f"{row['simulated_tokens_per_s']:.1f}",
            f"{row['error']:+.1%}",
        )
    console = Console(width=100)
    console.print(table)
    good = sum(abs(row["error"]) <= WITHIN for row in rows)
    console.print(f"{good} of {len(rows)} settings within {WITHIN:.0%}")
