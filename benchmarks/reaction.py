"""How soon the KV cache has its room after a burst begins, and what moving memory costs a step.

python -m benchmarks reaction [--model NAME] [--link GB/s] [--policy marginal|kv-first] [--rounds N]
                              [--json] [--save FILE]

An engine serves two quiet streams until the experts have what they want, then a burst of long
requests comes. Counted are the steps from the first that sees the burst until the KV cache has 90 %
of the most that it gets; the longest pause for a move is compared with the median step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

import fluxmoe
from benchmarks import machine, models
from benchmarks.phases import BLOCK, LINK, OPTIONS, configurations, live, phases
from fluxmoe import plugins
from fluxmoe.backends.vllm.child import ChildEngine
from fluxmoe.demo.model import DemoModel


class WatchedOptions(BaseModel):
    """Which policy is watched, and the file that a line per step is written to."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    file: str


class Watched(fluxmoe.ArbitrationPolicy):
    """Any built-in arbitration policy, and a line per step about what it was shown."""

    def __init__(self, policy: str, file: str) -> None:
        self._policy: fluxmoe.ArbitrationPolicy = plugins.load().create("arbitration", policy)
        self._file = open(file, "w", buffering=1)  # noqa: SIM115 - as long as the engine

    def split(self, view: fluxmoe.ArbitrationView) -> fluxmoe.Split:
        seen = {
            "kv": view.frames["kv"],
            "running": view.running_requests,
            "waiting": view.waiting_requests,
            "seconds": view.step_seconds,
        }
        print(json.dumps(seen), file=self._file)
        return self._policy.split(view)


@fluxmoe.hookimpl
def fluxmoe_register_policies(register: Any) -> None:
    register("watched", Watched, WatchedOptions)


def measure(model: DemoModel, link: float, policy: str, folder: Path) -> dict[str, float]:
    """One quiet time and one burst."""
    log = folder / "steps.jsonl"
    quiet, burst = phases()[2], phases()[0]
    fluxmoe_config = configurations(model, link, [], [policy])[policy]
    fluxmoe_config["arbitration"] = {"kind": "watched", "policy": policy, "file": str(log)}
    fluxmoe_config["plugins"].append(__file__)
    with ChildEngine(model.folder, fluxmoe=fluxmoe_config, **OPTIONS) as engine:
        live({policy: engine}, quiet)
        before = len(log.read_text().splitlines())
        live({policy: engine}, burst)
        state = engine.call("arbitration")
    steps = [json.loads(line) for line in log.read_text().splitlines()][before:]
    begin = next(i for i, step in enumerate(steps) if step["running"] + step["waiting"] > 4)
    room = [step["kv"] for step in steps[begin:]]
    step_seconds = median(step["seconds"] for step in steps[begin:] if step["seconds"])
    return {
        "frames_before": room[0],
        "frames_final": max(room),
        "steps_to_90_percent": next(i for i, kv in enumerate(room) if kv >= 0.9 * max(room)),
        "steps": len(room),
        "moves": sum(state["changes"].values()),
        "median_step_ms": step_seconds * 1e3,
        "longest_pause_ms": state["longest_pause"] * 1e3,
        "longest_pause_in_steps": state["longest_pause"] / step_seconds,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("reaction", description=__doc__.partition("\n")[0])
    models.add_option(parser, default="balanced")
    parser.add_argument("--link", type=float, default=LINK, help="GB/s to the store; 0: memory")
    parser.add_argument("--policy", nargs="*", default=["marginal", "kv-first"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        model = replace(models.get(arguments.model, Path(scratch)), block_tokens=BLOCK)
        rows = [
            {"policy": policy, **measure(model, arguments.link, policy, Path(scratch))}
            for _ in range(arguments.rounds)
            for policy in arguments.policy
        ]
    if arguments.save:
        machine.save(arguments.save, rows)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title="a burst after a quiet time")
    for column in rows[0]:
        table.add_column(
            column.replace("_", " "), justify="left" if column == "policy" else "right"
        )
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(table)
