"""Cost of recording a trace: ratio of the times of alternating steps with and without a recorder.

    python -m benchmarks recording [--rounds N] [--json] [--save FILE]

A Hugging Face model (random weights, 8 layers of 64 experts, top-8) decodes with all experts in
slots, so that only the recorder makes a difference. Each round times equally many steps with and
without the recorder, alternating; the result is the ratio of the medians over all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

import fluxmoe
from benchmarks import machine
from fluxmoe.testing import checkpoints

BATCHES = (1, 8, 64)
STEPS = 24
SHAPE = {
    "num_hidden_layers": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
KINDS: dict[str, dict[str, bool]] = {
    "ids": {},
    "ids, weights": {"weights": True},
    "ids, weights, predictions": {"weights": True, "predict": True},
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("recording", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write results as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoints.write(Path(scratch) / "model", "qwen3-moe", **SHAPE)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with fluxmoe.page(model, "1GiB", eviction="lru") as paged:
            rows = [
                measure(paged, batch, kind, Path(scratch) / "t.parquet", arguments.rounds)
                for batch in BATCHES
                for kind in KINDS
            ]
    if arguments.save:
        machine.save(arguments.save, rows)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)


def measure(paged: Any, batch: int, kind: str, trace: Path, rounds: int) -> dict[str, Any]:
    """Measure the seconds per step without and with the recorder."""
    steps = stepper(paged.model, batch)
    steps()
    plain, recorded = [], []
    for _ in range(rounds):
        for times, context in (
            (plain, nullcontext()),
            (recorded, paged.record(trace, replace=True, **KINDS[kind])),
        ):
            # Beginning and ending a recording are not timed.
            with context:
                started = time.perf_counter()
                steps()
                times.append((time.perf_counter() - started) / STEPS)
    before, after = statistics.median(plain), statistics.median(recorded)
    return {
        "batch": batch,
        "records": kind,
        "plain_ms": round(before * 1e3, 3),
        "recorded_ms": round(after * 1e3, 3),
        "overhead": round(after / before - 1, 4),
        "us_per_event": round((after - before) / paged._runtime.geometry.num_layers * 1e6, 2),
    }


def stepper(model: Any, batch: int) -> Callable[[], None]:
    """Make a function that decodes ``STEPS`` tokens after a short prompt that is computed once."""
    prompt = torch.randint(3, 250, (batch, 8), generator=torch.Generator().manual_seed(0))

    def steps() -> None:
        for _ in range(STEPS):
            model(prompt[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-STEPS)

    with torch.inference_mode():
        cache = DynamicCache()
        model(prompt, past_key_values=cache, use_cache=True)
    return torch.inference_mode()(steps)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="recording a trace: decode steps without and with it, medians")
    for column in ("batch", "records", "plain, ms", "recorded, ms", "overhead", "µs per event"):
        table.add_column(column, justify="left" if column == "records" else "right")
    for row in rows:
        table.add_row(
            str(row["batch"]),
            row["records"],
            f"{row['plain_ms']:.2f}",
            f"{row['recorded_ms']:.2f}",
            f"{row['overhead']:+.1%}",
            f"{row['us_per_event']:.1f}",
        )
    Console(width=100).print(table)
