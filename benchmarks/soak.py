"""Memory of an engine's process over many requests and moves, for stock vLLM and FluxMoE.

    python -m benchmarks soak [--minutes N] [--turns N] [--save FILE]

Both engines serve the same requests alternately. Each row has the resident memory of one process,
by kind: ``anon`` (heap, stacks), ``shmem`` (frames of experts and KV cache) and ``file``
(libraries). ``heap`` is the memory in use according to malloc, and ``free`` the memory that malloc
keeps for reuse. Growth of ``anon`` alone means fragmentation; growth of ``heap`` as well means live
data.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.demo.model import SHIPPED, DemoModel

DICE = Path(__file__).parents[1] / "tests/vllm/dice.py"
#: Requests per engine and turn, and maximum number of printed rows.
_TURN, _ROWS = 64, 24
_SEQUENCES = 16
#: Share of the rows after which growth is counted, because the first requests fill caches.
_WARM = 0.25

Row = dict[str, float]


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def held(_: object) -> Row:
    """Measure the memory of the calling process, in MiB, and count its objects."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"rss": "VmRSS", "anon": "RssAnon", "shmem": "RssShmem", "file": "RssFile"}
    row = {name: int(status[key].split()[0]) / 1024 for name, key in kinds.items()}
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    row |= {"heap": (info.uordblks + info.hblkhd) / 2**20, "free": info.fordblks / 2**20}
    return row | {"objects": float(len(gc.get_objects()))}


def traffic(seed: int) -> list[Prompt]:
    """Make a turn's requests: short and long, greedy and sampled, some with a shared beginning."""
    rng = random.Random(seed)
    shared = [random.Random(index).choices(range(3, 256), k=128) for index in range(4)]
    return [
        Prompt(
            rng.choice(shared)[: rng.choice([0, 64, 128])]
            + rng.choices(range(3, 256), k=rng.randint(1, 120)),
            rng.choice([3, 20, 60, 140]),
            temperature=float(index % 2),
            logprobs=index % 4 == 0,
        )
        for index in range(_TURN)
    ]


def settings(model: DemoModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the options of both engines, at one budget; FluxMoE's split changes constantly."""
    options = model.options(max_num_seqs=_SEQUENCES) | {"max_model_len": 512, "block_size": 32}
    budget = model.budget(_SEQUENCES * 2)
    fluxmoe = {
        "memory": {"budget": budget, "experts": {"target": model.experts_total_bytes // 2}},
        "arbitration": "dice",
        "plugins": [str(DICE)],
    }
    kv = {"kv_cache_memory_bytes": budget - model.experts_total_bytes}
    return options | kv, options | {"fluxmoe": fluxmoe}


def measure(seconds: float, turns: int | None = None) -> dict[str, list[Row]]:
    """Serve for a time or a number of turns; return rows of ``held`` and counters by engine."""
    model = DemoModel.read(SHIPPED)
    rows: dict[str, list[Row]] = {"stock": [], "FluxMoE": []}
    of_stock, of_paged = settings(model)
    with ChildEngine(SHIPPED, **of_stock) as stock, ChildEngine(SHIPPED, **of_paged) as paged:
        steps = dict.fromkeys(rows, 0)
        ends, turn = time.monotonic() + seconds, 0
        while time.monotonic() < ends and turn != turns:
            prompts = traffic(turn)
            for name, engine in (("stock", stock), ("FluxMoE", paged)):
                steps[name] += engine.generate(prompts, cold=False).steps
                changes = engine.call("arbitration")["changes"] if engine is paged else {}
                counts = {"turn": turn, "steps": steps[name], "moves": sum(changes.values())}
                rows[name].append(counts | engine.call("rpc", held))
            turn += 1
    return rows


def growth(rows: Sequence[Row]) -> Row:
    """Compute the growth of each column from the end of the first quarter to the last row."""
    first, last = rows[int(len(rows) * _WARM)], rows[-1]
    return {name: last[name] - first[name] for name in last}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--turns", type=int, help="turns of each engine, instead of a time")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write JSON with the machine")
    arguments = parser.parse_args(argv)
    results = measure(arguments.minutes * 60, arguments.turns)
    columns = [*results["FluxMoE"][0]]
    for name, rows in results.items():
        table = Table(title=f"{name}: MiB in the engine's process", title_justify="left")
        for column in columns:
            table.add_column(column, justify="right")
        for row in [*rows[:: max(len(rows) // _ROWS, 1)], growth(rows)]:
            table.add_row(*(f"{row[column]:.1f}".removesuffix(".0") for column in columns))
        Console().print(table)
    if arguments.save:
        machine.save(arguments.save, results)
