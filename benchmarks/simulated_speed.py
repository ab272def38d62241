"""Simulated against measured tokens per second, decode on the torch backend.

    python -m benchmarks simulated_speed [--profile FILE.yaml] [--json] [--save FILE]

The machine is measured first (``fluxmoe doctor --measure``): steps with every expert resident and
copies alone, nothing of what is compared here. Then, at each batch size and capacity, the shipped
model decodes from cold twice with the same tokens: once timed, once recorded. The recording is
simulated at the same capacity with the profile. One thread; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
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
STEPS, REPEATS, WITHIN = 64, 3, 0.15


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("simulated_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(SHIPPED), help="a checkpoint")
    parser.add_argument("--profile", type=Path, help="a profile measured before")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write JSON with the machine")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    given = arguments.profile
    profile = hardware.load(given) if given else measure(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    rows = [
        compare(model, profile, batch, share, arguments.steps)
        for batch, share in itertools.product(BATCHES, SHARES)
    ]
    results = {"load_average": load, "profile": profile.model_dump(), "settings": rows}
    if arguments.save:
        machine.save(arguments.save, results)
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        show(rows, load)


def compare(
    model: Any, profile: hardware.Profile, batch: int, share: float, steps: int
) -> dict[str, Any]:
    """One setting; the measured speed is the best of several runs, which have the same tokens."""
    geometry, _ = layout.describe(layout.experts_of(model))
    memory = room(model, max(int(geometry.num_pages * share), geometry.experts_per_layer))
    with (
        fluxmoe.page(model, memory, eviction=POLICY) as handle,
        tempfile.TemporaryDirectory() as folder,
    ):
        seconds = min(_decode(model, handle, batch, steps) for _ in range(REPEATS))
        slots, hit_rate = int(handle.stats()["slots"]), handle.stats()["hit_rate"]
        trace = Path(folder) / "trace.parquet"
        _decode(model, handle, batch, steps, trace)
        result = simulate(trace, POLICY, slots, hardware=profile)
    assert result.timing is not None
    assert abs(result.hit_rate - hit_rate) < 1e-12, "the simulator counts what the engine counts"
    measured, simulated = batch * steps / seconds, result.timing.tokens_per_s
    return {
        "batch": batch,
        "slots": slots,
        "pages": geometry.num_pages,
        "hit_rate": round(hit_rate, 4),
        "measured_tokens_per_s": round(measured, 1),
        "simulated_tokens_per_s": round(simulated, 1),
        "error": round(simulated / measured - 1, 4),
    }


def _decode(model: Any, handle: Any, batch: int, steps: int, record: Path | None = None) -> float:
    """Seconds of ``steps`` steps from cold; the prefill is neither timed nor recorded."""
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
