"""Phases with different demands at one budget: arbitration policies compared with fixed splits.

python -m benchmarks phases [--model balanced|shipped|mid] [--rounds N] [--policy NAME …]
                            [--share S …] [--link GB/s] [--phase NAME …] [--no-stock]
                            [--at-once N] [--save FILE]

A day is a series of phases, and each engine runs several days in its own process. A phase starts
from the state (split, caches) left by the previous phase, so transitions are included. All engines
complete a phase before any engine starts the next one. They take turns in an order that is redrawn
each time, and if there is a single user, they alternate after each question, so that a temporarily
slower machine affects all engines. A quiet stream precedes the first day.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import link as link_plugin
from benchmarks import machine, models
from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.demo.model import DemoModel

BLOCK = 32
LENGTH = 384
OPTIONS = {"enforce_eager": True, "max_model_len": LENGTH, "max_num_seqs": 64, "block_size": BLOCK}
#: Blocks of stock vLLM's KV cache in addition to all experts: one sequence of maximum length, and
#: the null block.
STOCK_BLOCKS = LENGTH // BLOCK + 1
#: GB/s to the store: loading all experts takes as long as ten steps of a single request. For a
#: model of 30 billion parameters on an H100 with PCIe 5, it takes as long as more than a hundred
#: steps.
LINK = 0.5
#: Engines that serve only one long context at a time.
SLOW = ("stock", "fixed 100%")
#: Memory that the fixed splits give to the experts, as a share of all experts' bytes.
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase, in which each user sends a question after the answer to the previous one.

    The engines alternate after each part.
    """

    name: str
    parts: tuple[tuple[Prompt, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens to generate."""
        return sum(prompt.max_tokens for part in self.parts for prompt in part)


def phases() -> list[Phase]:
    """List the phases: long contexts, 64 chats, one stream, shared prefixes, and long contexts.

    Each phase lasts at least 500 steps, regardless of the number of concurrent requests.
    """
    rng = random.Random(11)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(count)]

    def phase(name: str, users: int, asked: Callable[[], Iterable[list[int]]], size: int) -> Phase:
        prompts: list[Prompt] = []
        for _ in range(users):
            for number, question in enumerate(asked()):
                after = len(prompts) - 1 if number else None
                prompts.append(Prompt(question, size, temperature=1.0, after=after))
        if users > 1:
            return Phase(name, (tuple(prompts),))
        return Phase(name, tuple((replace(prompt, after=None),) for prompt in prompts))

    def talks() -> Iterable[list[int]]:
        """Make the prompts of three ten-turn conversations; each contains all previous turns."""
        for _ in range(3):
            said = tokens(10 * BLOCK)
            yield from (said[: turn * BLOCK] + tokens(12) for turn in range(1, 11))

    return [
        phase("long contexts", 32, lambda: [tokens(128) for _ in range(2)], 256),
        phase("chat at 64", 64, lambda: [tokens(24) for _ in range(5)], 104),
        phase("quiet stream", 1, lambda: [tokens(24) for _ in range(8)], 344),
        phase("prefix-heavy turns", 40, talks, 17),
        phase("long contexts again", 32, lambda: [tokens(128) for _ in range(2)], 256),
    ]


def budget_of(model: DemoModel) -> int:
    """Compute the budget, which holds all experts and stock vLLM's KV cache."""
    return model.experts_total_bytes + STOCK_BLOCKS * model.kv_block_bytes


def configurations(
    model: DemoModel, link: float, shares: Sequence[float], policies: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Make the configurations to compare with stock: fixed splits and policies."""
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
    """Results of one phase on one engine."""

    tokens_per_s: float
    steps: int


def live(engines: dict[str, ChildEngine], phase: Phase, at_once: int = 1) -> dict[str, Lived]:
    """Run a phase on all engines, starting from the state left by previous phases."""
    seconds, steps = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)

    def serve(name: str, part: Sequence[Prompt]) -> None:
        run = engines[name].generate(part, cold=False)
        seconds[name] += run.seconds
        steps[name] += run.steps

    with ThreadPoolExecutor(at_once) as pool:
        for part in phase.parts:
            # The slow engines come first, so that no other engine runs alone at the end.
            order = sorted(engines, key=lambda name: (name not in SLOW, random.random()))
            list(pool.map(serve, order, repeat(part)))
    return {name: Lived(phase.tokens / seconds[name], steps[name]) for name in engines}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("phases", description=__doc__.partition("\n")[0])
    models.add_option(parser, default="balanced")
    parser.add_argument("--rounds", type=int, default=3, help="number of days")
    parser.add_argument("--share", nargs="+", type=float, default=SHARES, help="fixed splits")
    parser.add_argument("--policy", nargs="*", default=["marginal", "kv-first", "rho"])
    parser.add_argument("--link", type=float, default=LINK, help="GB/s to the store; 0: no link")
    parser.add_argument("--phase", nargs="*", help="run only these phases")
    parser.add_argument("--no-stock", action="store_true", help="omit stock vLLM, which is slow")
    parser.add_argument("--at-once", type=int, default=1, help="engines that run at a time")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args(argv)
    day = [phase for phase in phases() if not arguments.phase or phase.name in arguments.phase]
    changes: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        model = replace(models.get(arguments.model, Path(scratch)), block_tokens=BLOCK)
        stock = {"kv_cache_memory_bytes": STOCK_BLOCKS * model.kv_block_bytes, **OPTIONS}
        engines = {} if arguments.no_stock else {"stock": ChildEngine(model.folder, **stock)}
        for name, fluxmoe in configurations(
            model, arguments.link, arguments.share, arguments.policy
        ).items():
            engines[name] = ChildEngine(model.folder, fluxmoe=fluxmoe, **OPTIONS)
        seen: dict[str, list[list[Lived]]] = {name: [] for name in engines}
        for engine in engines.values():
            stack.enter_context(engine)
        for engine in engines.values():
            engine.generate(phases()[2].parts[0])
        for _ in range(arguments.rounds):
            today = []
            for phase in day:
                today.append(live(engines, phase, arguments.at_once))
            for name, days in seen.items():
                days.append([lived[name] for lived in today])
            for name in arguments.policy:
                changes[name] = engines[name].call("arbitration")["changes"]
            if arguments.save:  # after every day, as a day is long
                save(arguments.save, arguments.model, budget_of(model), day, seen, changes)
    report(budget_of(model), day, seen, changes)


def medians(seen: dict[str, list[list[Lived]]]) -> dict[str, list[float]]:
    """Compute the median tokens per second of each engine in each phase."""
    return {
        name: [median(lived.tokens_per_s for lived in column) for column in zip(*days, strict=True)]
        for name, days in seen.items()
    }


def save(
    path: Path,
    model: str,
    budget: int,
    day: Sequence[Phase],
    seen: dict[str, list[list[Lived]]],
    changes: dict[str, dict[str, int]],
) -> None:
    """Save all measurements."""
    machine.save(
        path,
        {
            "model": model,
            "budget_bytes": budget,
            "phases": [phase.name for phase in day],
            "tokens": [phase.tokens for phase in day],
            "tokens_per_s": medians(seen),
            "steps": {name: [lived.steps for lived in days[-1]] for name, days in seen.items()},
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
    seen: dict[str, list[list[Lived]]],
    changes: dict[str, dict[str, int]],
) -> None:
    """Print the tokens per second, and their ratios to the best fixed split in each phase."""
    rates = medians(seen)
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
            f"{rate:.0f} ({rate / top:.2f}) {lived.steps}"
            for rate, top, lived in zip(row, best, seen[name][-1], strict=True)
        ]
        whole = f"{seconds[name]:.0f} s ({quickest / seconds[name]:.2f})"
        table.add_row(name, *cells, whole, str(sum(changes.get(name, {}).values()) or ""))
    Console(width=200).print(table)
