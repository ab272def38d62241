"""Accesses per second replayed by the simulator on one core, compared with MoE-PolicyLang's replay.

    python -m benchmarks simulator [--steps N] [--capacity 25%] [--json] [--save FILE]

48 layers x 128 experts, top-8, batch 1: 100,000 steps are 38.4 million accesses. ``numpy`` is the
three-line policy of the documentation, which is called in Python for each event that is short of
slots; for this policy, only a tenth of the steps are replayed. Compilation is not timed.

The replay of MoE-PolicyLang (PyPI ``moe-policylang``) is measured in the same run if it can be
imported; it is not a dependency. ``pip install --no-deps --target DIR moe-policylang`` and
``PYTHONPATH=DIR`` are sufficient. It replays the same routing layer by layer, with the layer's
share of the capacity, from a matrix of router outputs, which is its input format. Only one layer is
timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import fluxmoe
from benchmarks import machine
from fluxmoe import plugins
from fluxmoe.core.types import EventList
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import Simulation
from fluxmoe.trace import TraceMeta

LAYERS, EXPERTS, TOP_K = 48, 128, 8
#: Goals in millions of accesses per second (issue 4).
GOALS = {"lru": 20.0, "lfu": 20.0, "belady": 5.0, "lfru": 3.0, "next-use": 3.0, "numpy": 0.5}
RIVAL = "moe_policylang.benchmark.replay"
RIVAL_STEPS, FACTOR = 20_000, 15.0
_CHUNK = 500


class _Numpy(fluxmoe.EvictionPolicy):
    def score(self, view, pages):  # type: ignore[no-untyped-def]
        return -view.last_use[pages]


class _Plugin:
    @fluxmoe.hookimpl
    def fluxmoe_register_policies(self, register: Callable[..., None]) -> None:
        register("numpy", _Numpy)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("simulator", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--capacity", default="10%,25%,50%", help="one or more, comma-separated")
    parser.add_argument("--policies", default=",".join(GOALS), help="comma-separated")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write results as JSON")
    arguments = parser.parse_args(argv)
    ids = routing(arguments.steps)
    load = os.getloadavg()[0]
    rows = [
        measure(ids, policy, capacity)
        for policy in arguments.policies.split(",")
        for capacity in arguments.capacity.split(",")
    ]
    rivals = [row for capacity in arguments.capacity.split(",") for row in rival(ids, capacity)]
    results = {"load_average": [round(load, 2), round(os.getloadavg()[0], 2)], "rates": rows}
    results["moe_policylang"] = rivals
    if arguments.save:
        machine.save(arguments.save, results)
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        show(rows, rivals, load)


def routing(steps: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """Draw Zipf-distributed experts without replacement: int32 ``[steps, layers, top_k]``."""
    rng = np.random.default_rng(seed)
    ranks = np.argsort(rng.standard_normal((LAYERS, EXPERTS)), axis=1)
    popularity = -np.log(np.arange(1, EXPERTS + 1, dtype=np.float32))[ranks]
    ids = np.empty((steps, LAYERS, TOP_K), np.int32)
    for first in range(0, steps, _CHUNK):
        part = ids[first : first + _CHUNK]
        noise = -np.log(rng.standard_exponential((len(part), LAYERS, EXPERTS), np.float32))
        part[...] = np.argpartition(-(noise + popularity), TOP_K, axis=2)[..., :TOP_K]
    return ids


def measure(ids: npt.NDArray[np.int32], policy: str, capacity: str) -> dict[str, Any]:
    """Time one run, including the single computation of an oracle's future."""
    registry = plugins.load()
    registry.add(_Plugin(), "benchmark")
    Simulation(events_of(ids[:300]), policy, capacity, registry=registry).run()  # compiles
    events = events_of(ids[: len(ids) // 10] if policy == "numpy" else ids)
    run = Simulation(events, policy, capacity, registry=registry)
    started = time.perf_counter()
    result = run.run()
    seconds = time.perf_counter() - started
    return {
        "policy": policy,
        "capacity": capacity,
        "accesses": result.accesses,
        "hit_rate": round(result.hit_rate, 4),
        "seconds": round(seconds, 3),
        "maccesses_per_s": round(result.accesses / seconds / 1e6, 2),
        "goal": GOALS.get(policy),
    }


def events_of(ids: npt.NDArray[np.int32]) -> Events:
    steps = len(ids)
    count = steps * LAYERS
    block = EventList(
        step=np.repeat(np.arange(steps, dtype=np.int32), LAYERS),
        layer=np.tile(np.arange(LAYERS, dtype=np.int16), steps),
        phase=np.ones(count, np.int8),
        offsets=np.arange(count + 1, dtype=np.int64) * TOP_K,
        ids=np.ascontiguousarray(ids).reshape(-1),
    )
    return Events(TraceMeta("synthetic", LAYERS, EXPERTS, TOP_K, 3 << 20, "benchmark"), block)


def rival(ids: npt.NDArray[np.int32], capacity: str) -> list[dict[str, Any]]:
    """Time MoE-PolicyLang's replay of one layer; return no rows if it is not installed."""
    try:
        replay = importlib.import_module(RIVAL)
    except ImportError:
        return []
    layer = ids[:RIVAL_STEPS, 0]
    router = np.zeros((len(layer), EXPERTS), np.float32)
    np.put_along_axis(router, layer, np.float32(1 / TOP_K), axis=1)
    budget = int(EXPERTS * float(capacity.rstrip("%")) / 100)
    rows = []
    for name in ("topk_lru", "topk_lfu"):
        started = time.perf_counter()
        hits, accesses = replay.POLICIES[name](router, TOP_K, budget)
        seconds = time.perf_counter() - started
        rate = accesses / seconds / 1e6
        row = {"policy": name, "capacity": capacity, "hit_rate": round(hits / accesses, 4)}
        rows.append({**row, "seconds": round(seconds, 3), "maccesses_per_s": round(rate, 3)})
    return rows


def show(rows: list[dict[str, Any]], rivals: list[dict[str, Any]], load: float) -> None:
    console = Console(width=100)
    table = Table(
        *("policy", "capacity", "hit rate", "M accesses/s", "goal"),
        title=f"{LAYERS} layers x {EXPERTS} experts, top-{TOP_K}, batch 1, one core; "
        f"load average {load:.1f}",
        title_justify="left",
    )
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:g}"
        rate = f"{row['maccesses_per_s']:.2f}"
        table.add_row(row["policy"], row["capacity"], f"{row['hit_rate']:.1%}", rate, goal)
    for row in rivals:
        rate = f"{row['maccesses_per_s']:.2f}"
        name = f"MoE-PolicyLang {row['policy']}"
        table.add_row(name, row["capacity"], f"{row['hit_rate']:.1%}", rate, "")
    console.print(table)
    if not rivals:
        console.print("MoE-PolicyLang is not installed; `python -m benchmarks simulator -h`")
    mine = {(row["policy"], row["capacity"]): row["maccesses_per_s"] for row in rows}
    for row in rivals:
        ours = mine.get((row["policy"].removeprefix("topk_"), row["capacity"]))
        if ours is not None:
            factor = ours / row["maccesses_per_s"]
            name = f"{row['policy']} at {row['capacity']}"
            console.print(f"{factor:.1f} x MoE-PolicyLang's {name}; the goal is {FACTOR:g}")
