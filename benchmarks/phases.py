"""A day in a minute: phases with different demands, one budget, fixed splits against policies.

python -m benchmarks phases [--model balanced|shipped|mid] [--rounds N] [--policy NAME …]
                            [--share S …] [--link GB/s] [--save FILE]

Every engine lives through day after day in a process of its own; what a phase leaves behind (split,
caches) is where the next one begins, so transitions are part of the figures. All engines go through
a phase before any goes on to the next, in an order that changes: a machine that is slower for a
minute is slower for all. A quiet stream comes before the first day.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import link as link_plugin
from benchmarks import machine, models
from fluxmoe.backends.vllm.child import ChildEngine, Prompt
from fluxmoe.demo.model import DemoModel

BLOCK = 32
LENGTH = 384
OPTIONS = {"enforce_eager": True, "max_model_len": LENGTH, "max_num_seqs": 64, "block_size": BLOCK}
#: Stock's KV cache beside all experts: one sequence of the greatest length, and vLLM's null block.
STOCK_BLOCKS = LENGTH // BLOCK + 1
#: Bytes of experts that the fixed splits have, as shares of all experts.
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Phase:
    """Waves of requests: those of a wave arrive together, the next wave when all are answered."""

    name: str
    waves: tuple[tuple[Prompt, ...], ...]

    @property
    def tokens(self) -> int:
        """What is to be generated."""
        return sum(prompt.max_tokens for wave in self.waves for prompt in wave)


def phases() -> list[Phase]:
    """Burst of long contexts, chat at 64, one quiet stream, turns with common prefixes, burst.

    Each lasts at least 500 steps, however many requests run at once.
    """
    rng = random.Random(11)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(count)]

    def wave(count: int, prompt: int, answer: int) -> tuple[Prompt, ...]:
        return tuple(Prompt(tokens(prompt), answer, temperature=1.0) for _ in range(count))

    def turns(sessions: int, count: int) -> tuple[tuple[Prompt, ...], ...]:
        talks = [tokens(64 * count) for _ in range(sessions)]
        return tuple(
            tuple(Prompt(talk[: 64 * turn] + tokens(12), 45, temperature=1.0) for talk in talks)
            for turn in range(1, count + 1)
        )

    return [
        Phase("long contexts", (wave(40, 240, 136),)),
        Phase("chat at 64", (wave(640, 12, 52),)),
        Phase("quiet stream", tuple(wave(1, 24, 344) for _ in range(5))),
        Phase("prefix-heavy turns", turns(12, 5) + turns(12, 5) + turns(12, 5)),
        Phase("long contexts again", (wave(40, 240, 136),)),
    ]


def budget_of(model: DemoModel) -> int:
    """All experts and stock's KV cache."""
    return model.experts_total_bytes + STOCK_BLOCKS * model.kv_block_bytes


def configurations(
    model: DemoModel, link: float, shares: Sequence[float], policies: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What is compared with stock: fixed splits, policies."""
    budget = budget_of(model)
    store: dict[str, Any] = {"kind": "host"}
    if link:
        store["codec"] = {"kind": "link", "gb_per_s": link}
    common = {"copy_threads": 0, "stores": [store], "plugins": [link_plugin.__file__]}
    found: dict[str, dict[str, Any]] = {}
    for share in shares:
        target = int(share * model.experts_total_bytes)
        memory = {"budget": budget, "experts": {"target": target}}
        found[f"fixed {share:.0%}"] = {"memory": memory, **common}
    for policy in policies:
        found[policy] = {"memory": {"budget": budget}, "arbitration": policy, **common}
    return found


@dataclass(frozen=True, slots=True)
class Lived:
    """One phase of one engine."""

    tokens_per_s: float
    steps: int


def live(engine: ChildEngine, phase: Phase) -> Lived:
    """Go through a phase with what the phases before have left behind."""
    runs = [engine.generate(wave, cold=False) for wave in phase.waves]
    return Lived(phase.tokens / sum(run.seconds for run in runs), sum(run.steps for run in runs))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("phases", description=__doc__.partition("\n")[0])
    models.add_option(parser, default="balanced")
    parser.add_argument("--rounds", type=int, default=3, help="days")
    parser.add_argument("--share", nargs="*", type=float, default=SHARES, help="fixed splits")
    parser.add_argument("--policy", nargs="*", default=["marginal", "kv-first", "rho"])
    parser.add_argument("--link", type=float, default=1.0, help="GB/s to the store; 0: memory")
    parser.add_argument("--phase", nargs="*", help="only these")
    parser.add_argument("--no-stock", action="store_true", help="spare the time that stock takes")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args(argv)
    day = [phase for phase in phases() if not arguments.phase or phase.name in arguments.phase]
    seen: dict[str, list[list[Lived]]] = {}
    changes: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        model = replace(models.get(arguments.model, Path(scratch)), block_tokens=BLOCK)
        stock = {"kv_cache_memory_bytes": STOCK_BLOCKS * model.kv_block_bytes, **OPTIONS}
        engines = {} if arguments.no_stock else {"stock": ChildEngine(model.folder, **stock)}
        for name, fluxmoe in configurations(
            model, arguments.link, arguments.share, arguments.policy
        ).items():
            engines[name] = ChildEngine(model.folder, fluxmoe=fluxmoe, **OPTIONS)
        for engine in engines.values():
            stack.enter_context(engine)
        names = list(engines)
        for engine in engines.values():
            engine.generate(phases()[2].waves[0])
        for _ in range(arguments.rounds):
            today: dict[str, list[Lived]] = {name: [] for name in engines}
            for phase in day:
                names = names[1:] + names[:1]
                for name in names:
                    today[name].append(live(engines[name], phase))
            for name, lived in today.items():
                seen.setdefault(name, []).append(lived)
        for name in arguments.policy:
            changes[name] = engines[name].call("arbitration")["changes"]
    rates = {
        name: [median(lived.tokens_per_s for lived in column) for column in zip(*days, strict=True)]
        for name, days in seen.items()
    }
    steps = {name: [lived.steps for lived in days[-1]] for name, days in seen.items()}
    report(budget_of(model), day, rates, steps, changes)
    if arguments.save:
        machine.save(
            arguments.save,
            {
                "model": arguments.model,
                "budget_bytes": budget_of(model),
                "phases": [phase.name for phase in day],
                "tokens": [phase.tokens for phase in day],
                "tokens_per_s": rates,
                "steps": steps,
                "changes": changes,
                "runs": {
                    name: [[lived.tokens_per_s for lived in column] for column in days]
                    for name, days in seen.items()
                },
            },
        )


def report(
    budget: int,
    day: Sequence[Phase],
    rates: dict[str, list[float]],
    steps: dict[str, list[int]],
    changes: dict[str, dict[str, int]],
) -> None:
    """Tokens per second, and what they are worth: per phase against the best fixed split."""
    fixed = [name for name in rates if name.startswith("fixed")]
    best = [max(rates[name][i] for name in fixed) for i in range(len(day))]
    seconds = {
        name: sum(phase.tokens / rate for phase, rate in zip(day, rates[name], strict=True))
        for name in rates
    }
    quickest = min(seconds[name] for name in fixed)
    table = Table(title=f"tokens/s at {budget / 2**20:.0f} MiB (of the best fixed split), steps")
    for column in ("", *(phase.name for phase in day), "whole day", "moves"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rates.items():
        cells = [
            f"{rate:.0f} ({rate / top:.2f}) {count}"
            for rate, top, count in zip(row, best, steps[name], strict=True)
        ]
        whole = f"{seconds[name]:.0f} s ({quickest / seconds[name]:.2f})"
        table.add_row(name, *cells, whole, str(sum(changes.get(name, {}).values()) or ""))
    Console(width=200).print(table)
