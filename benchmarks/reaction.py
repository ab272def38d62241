"""Time until the KV cache has grown after a burst begins, and the cost of moves in a step.

python -m benchmarks reaction [--model NAME] [--link GB/s] [--policy marginal|kv-first] [--rounds N]
                              [--json] [--save FILE]

An engine serves a quiet stream until the experts have grown; then a burst of long requests arrives.
The result is the number of steps from the first step of the burst until the KV cache has 90% of its
maximum size. The longest pause for a move is compared with the median step.
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
from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.demo.model import DemoModel


class WatchedOptions(BaseModel):
    """The wrapped policy, and the file that gets one line per call."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    file: str


class Watched(fluxmoe.ArbitrationPolicy):
    """A built-in arbitration policy that logs its input, one line per call."""

    def __init__(self, policy: str, file: str) -> None:
        self._policy: fluxmoe.ArbitrationPolicy = plugins.load().create("arbitration", policy)
        self.interval, self.calm_interval = self._policy.interval, self._policy.calm_interval
        self._file = open(file, "w", buffering=1)  # noqa: SIM115 - open as long as the engine

    def split(self, view: fluxmoe.ArbitrationView) -> fluxmoe.Split:
        seen = {
            "step": view.step,
            "kv": view.frames["kv"],
            "requests": view.running_requests + view.waiting_requests,
            "seconds": [step.seconds for step in view.steps if step.tokens],
        }
        print(json.dumps(seen), file=self._file)
        return self._policy.split(view)


@fluxmoe.hookimpl
def fluxmoe_register_policies(register: Any) -> None:
    register("watched", Watched, WatchedOptions)


def measure(model: DemoModel, link: float, policy: str, folder: Path) -> dict[str, float]:
    """Measure one quiet period and one burst."""
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
    calls = [json.loads(line) for line in log.read_text().splitlines()][before:]
    burst_calls = [call for call in calls if call["requests"] > 4]
    room = [call["kv"] for call in burst_calls]
    there = next(call for call in burst_calls if call["kv"] >= 0.9 * max(room))
    # The burst may have begun up to ``interval - 1`` steps before the policy was called.
    begin = burst_calls[0]["step"] - (plugins.load().create("arbitration", policy).interval - 1)
    step_seconds = median(seconds for call in burst_calls for seconds in call["seconds"])
    return {
        "frames_before": room[0],
        "frames_final": max(room),
        "steps_to_90_percent": there["step"] - begin,
        "steps": burst_calls[-1]["step"] - begin,
        "moves": sum(state["changes"].values()),
        "median_step_ms": step_seconds * 1e3,
        "longest_pause_ms": state["longest_pause"] * 1e3,
        "longest_pause_in_steps": state["longest_pause"] / step_seconds,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("reaction", description=__doc__.partition("\n")[0])
    models.add_option(parser, default="balanced")
    parser.add_argument("--link", type=float, default=LINK, help="GB/s to the store; 0: no link")
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
