"""Runner of vLLM's cells: stock once per setting, then each cell in the same child process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.errors import FluxMoEError
from tests.identity import models, requests
from tests.identity.cells import MLA, Cell
from tests.identity.outcome import COUNTERS, Outcome

#: Models whose vLLM module imports torchvision, which the lock file does not contain.
MULTIMODAL = ("qwen3.5-moe",)


@dataclass(frozen=True, slots=True)
class Answers:
    """Tokens and log-probabilities per request, cached prompt tokens, steps of the first wave."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    cached: int
    first_steps: int


class Engines:
    """Child processes, one per kind of engine, started on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._children: dict[tuple[bool, bool], ChildEngine] = {}
        self._stock: dict[tuple[Any, ...], Answers | str] = {}

    def close(self) -> None:
        self._stack.close()

    def run(self, cell: Cell) -> Outcome:
        """Compare one cell with stock vLLM in the same setting."""
        if cell.stock not in self._stock:
            self._stock[cell.stock] = self._ask(cell, None)[0]
        stock = self._stock[cell.stock]
        if isinstance(stock, str):
            return Outcome(error=f"stock: {stock}")
        paged, stats = self._ask(cell, self._config(cell))
        if isinstance(paged, str):
            return Outcome(error=paged)
        pairs = list(zip(stock.tokens, paged.tokens, strict=True))
        identical = sum(a == b for a, b in pairs)
        bits = sum(a == b for a, b in zip(stock.logprobs, paged.logprobs, strict=True))
        differs = False
        if bits < len(pairs):
            again, _ = self._ask(cell, None)
            differs = again != stock
        stats |= {
            "cached_prompt_tokens": paged.cached,
            "stock_cached_prompt_tokens": stock.cached,
            "steps_of_the_long_prompt": paged.first_steps,
        }
        return Outcome(len(pairs), identical, bits, "", differs, stats)

    def stock(self, cell: Cell) -> Answers | str:
        """Return stock's answer for this cell, or its error."""
        return self._stock[cell.stock]

    def _config(self, cell: Cell) -> dict[str, Any]:
        shape = models.shape(models.write(self._folder, cell.model))
        arena = shape.arena_bytes(cell.slots, cell.banks)
        return {
            "memory": {
                "budget": arena + requests.KV_BYTES,
                "frame": models.FRAME,
                "experts": {"target": arena},
                "kv": {"target": requests.KV_BYTES},
                "banks": cell.banks,
            },
            "eviction": cell.eviction,
            "prefetch": cell.prefetch,
            "strict_policies": True,
        }

    def _ask(self, cell: Cell, fluxmoe: dict[str, Any] | None) -> tuple[Answers | str, Any]:
        assert cell.prefix_caching is not None and cell.chunked_prefill is not None
        path = models.write(self._folder, cell.model)
        options = requests.options(cell.mode, cell.prefix_caching, cell.chunked_prefill)
        if cell.model in MLA:
            options["block_size"] = 16  # the only size that vLLM supports for MLA on a CPU
        if fluxmoe is None:
            options["kv_cache_memory_bytes"] = requests.KV_BYTES
        waves = requests.waves(models.shape(path).vocabulary, seeded=not cell.chunked_prefill)
        try:
            engine = self._start(cell, path, fluxmoe, options)
            for setting in ("prefix_caching", "chunked_prefill"):
                if engine.info[setting] != getattr(cell, setting):
                    return f"vLLM changed {setting} to {engine.info[setting]}", {}
            runs = [engine.generate(wave, cold=not number) for number, wave in enumerate(waves)]
            stats = engine.call("stats") if fluxmoe is not None else {}
        except FluxMoEError as error:
            return str(error), {}
        answers = Answers(
            [tokens for run in runs for tokens in run.tokens],
            [row for run in runs for row in run.logprobs],
            sum(sum(run.cached) for run in runs),
            runs[0].steps,
        )
        return answers, {key: stats[key] for key in COUNTERS if key in stats}

    def _start(
        self, cell: Cell, path: Path, fluxmoe: dict[str, Any] | None, options: dict[str, Any]
    ) -> ChildEngine:
        kind = three, _ = cell.mode == "vllm three-process", cell.model in MULTIMODAL
        if kind in self._children:
            self._children[kind].restart(model=path, fluxmoe=fluxmoe, **options)
        else:
            with _torchvision() if cell.model in MULTIMODAL else nullcontext():
                child = ChildEngine(path, fluxmoe=fluxmoe, three_processes=three, **options)
            self._children[kind] = self._stack.enter_context(child)
        return self._children[kind]


@contextmanager
def _torchvision() -> Iterator[None]:
    """Let child processes import torchvision's names."""
    folder, before = str(Path(__file__).with_name("stand_ins")), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, before]))
    sys.path.insert(0, folder)  # multiprocessing passes the path on
    try:
        yield
    finally:
        sys.path.remove(folder)
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextmanager
def engines(folder: Path) -> Iterator[Engines]:
    """Provide ``Engines`` that are closed at the end."""
    running = Engines(folder)
    try:
        yield running
    finally:
        running.close()
