"""A day in a minute: phases with different demands, one budget, fixed splits against policies.

python -m benchmarks phases [--model shipped|mid] [--rounds N] [--scale S] [--policy NAME …]
                            [--save FILE]

Each engine lives through all phases; what one leaves behind (split, caches) is where the next one
begins. Transitions are part of the figures.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine, models
from fluxmoe.backends.vllm.child import ChildEngine, Prompt
from fluxmoe.demo.model import DemoModel

BLOCK = 32
OPTIONS = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 64, "block_size": BLOCK}
#: Stock's KV cache beside all experts: about four sequences of 512 tokens.
STOCK_BLOCKS = 68
#: Bytes of experts that the fixed splits have, as shares of all experts.
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests that arrive together, and again until the phase is over."""

    name: str
    prompts: tuple[Prompt, ...]


def phases(scale: float) -> list[Phase]:
    """Burst of long contexts, chat at 64, one quiet stream, turns with common prefixes, burst."""
    rng = random.Random(11)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(count)]

    def length(count: int) -> int:
        return max(4, round(count * scale))

    def batch(count: int, prompt: int, answer: int) -> tuple[Prompt, ...]:
        return tuple(Prompt(tokens(prompt), length(answer)) for _ in range(count))

    sessions = [tokens(256) for _ in range(6)]
    turns = [
        Prompt(session[: 64 * turn] + tokens(12), length(40))
        for turn in (1, 2, 3, 4)
        for session in sessions
    ]
    return [
        Phase("long contexts", batch(48, 320, 180)),
        Phase("chat at 64", batch(192, 16, 160)),
        Phase("quiet stream", batch(2, 24, 440)),
        Phase("prefix-heavy turns", (*turns, *turns)),
        Phase("long contexts again", batch(48, 320, 180)),
    ]


def budget_of(model: DemoModel) -> int:
    """All experts and stock's KV cache."""
    return model.experts_total_bytes + STOCK_BLOCKS * model.kv_block_bytes


def configurations(model: DemoModel, policies: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """What is compared: stock, fixed splits, policies."""
    budget = budget_of(model)
    found: dict[str, dict[str, Any] | None] = {"stock": None}
    for share in SHARES:
        target = int(share * model.experts_total_bytes)
        found[f"fixed {share:.0%}"] = {
            "memory": {"budget": budget, "experts": {"target": target}},
            "copy_threads": 0,
        }
    for policy in policies:
        found[policy] = {
            "memory": {"budget": budget},
            "arbitration": policy,
            "copy_threads": 0,
        }
    return found


def live(engine: ChildEngine, day: Sequence[Phase]) -> list[float]:
    """Tokens per second of each phase, with what the phases before have left behind."""
    return [
        engine.generate(phase.prompts, cold=first).tokens_per_s
        for phase, first in zip(day, [True] + [False] * len(day), strict=False)
    ]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("phases", description=__doc__.partition("\n")[0])
    models.add_option(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the answers")
    parser.add_argument("--policy", nargs="*", default=["marginal", "kv-first", "rho"])
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args(argv)
    day = phases(arguments.scale)
    seen: dict[str, list[list[float]]] = {}
    changes: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = replace(models.get(arguments.model, Path(scratch)), block_tokens=BLOCK)
        stock = {"kv_cache_memory_bytes": STOCK_BLOCKS * model.kv_block_bytes, **OPTIONS}
        with ChildEngine(model.folder, **stock) as engine:
            for _ in range(arguments.rounds):
                for name, fluxmoe in configurations(model, arguments.policy).items():
                    engine.restart(fluxmoe=fluxmoe, **(OPTIONS if fluxmoe else stock))
                    seen.setdefault(name, []).append(live(engine, day))
                    if fluxmoe and "arbitration" in fluxmoe:
                        changes[name] = engine.call("arbitration")["changes"]
    rates = {
        name: [median(column) for column in zip(*runs, strict=True)] for name, runs in seen.items()
    }
    report(budget_of(model), day, rates, changes)
    if arguments.save:
        machine.save(
            arguments.save,
            {
                "budget_bytes": budget_of(model),
                "phases": [phase.name for phase in day],
                "tokens_per_s": rates,
                "changes": changes,
                "runs": seen,
            },
        )


def report(
    budget: int,
    day: Sequence[Phase],
    rates: dict[str, list[float]],
    changes: dict[str, dict[str, int]],
) -> None:
    """Tokens per second, and what they are worth: per phase against the best fixed split."""
    fixed = [name for name in rates if name.startswith("fixed")]
    best = [max(rates[name][i] for name in fixed) for i in range(len(day))]
    work = [sum(prompt.max_tokens for prompt in phase.prompts) for phase in day]
    seconds = {
        name: sum(tokens / rate for tokens, rate in zip(work, rates[name], strict=True))
        for name in rates
    }
    quickest = min(seconds[name] for name in fixed)
    table = Table(title=f"tokens/s at {budget / 2**20:.0f} MiB (of the best fixed split)")
    for column in ("", *(phase.name for phase in day), "whole day", "moves"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rates.items():
        cells = [f"{rate:.0f} ({rate / top:.2f})" for rate, top in zip(row, best, strict=True)]
        whole = f"{seconds[name]:.0f} s ({quickest / seconds[name]:.2f})"
        table.add_row(name, *cells, whole, str(sum(changes.get(name, {}).values()) or ""))
    Console(width=200).print(table)
