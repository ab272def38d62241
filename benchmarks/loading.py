"""Memory that an engine needs while it loads a model, and the amount of checkpoint data read.

    python -m benchmarks loading [--backend vllm|torch] [--gib SIZE] [--save FILE]

A random checkpoint is loaded once by stock vLLM or transformers, and twice by FluxMoE with a page
file and slots for a third of the experts; the second start finds the page file. Each row has the
peak of anonymous and shared memory of the engine's processes, the bytes of the checkpoint that are
in the page cache afterwards (none are before the start), and whether the tokens equal those of the
stock engine.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.stores.disk import residency
from fluxmoe.testing import checkpoints

_SHAPE = {
    "hidden_size": 1024,
    "moe_intermediate_size": 768,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
_PAGE = 3 * 1024 * 768 * 2
_KV = 64 << 20
_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "block_size": 32,
}
_BATCH = [Prompt([5 + i, 6, 7, 8 * i + 3], 16) for i in range(4)]


class Peak:
    """Samples the anonymous and shared memory of this process's children, in bytes."""

    def __enter__(self) -> Peak:
        self.nbytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            each = psutil.Process().children(recursive=True)
            self.nbytes = max(self.nbytes, sum(_own(process.pid) for process in each))


def _own(pid: int) -> int:
    """Return the anonymous and shared memory of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(sizes.get(name, "0").split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def cached(folder: Path) -> int:
    """Return the bytes of a checkpoint that are in the page cache."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            places = range(0, size, mmap.PAGESIZE)
            total += sum(residency.cached(file.fileno(), at, 1) for at in places) * mmap.PAGESIZE
    return total


def forget(folder: Path) -> None:
    """Drop a checkpoint from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


#: The bytes of the checkpoint that an engine has read, and its tokens.
Found = tuple[int, list[list[int]]]


def in_vllm(model: Path, fluxmoe: dict[str, Any] | None) -> Found:
    """Continue the prompts in vLLM."""
    options: dict[str, Any] = {"fluxmoe": fluxmoe} if fluxmoe else {"kv_cache_memory_bytes": _KV}
    with ChildEngine(model, **_OPTIONS, **options) as engine:
        return cached(model), engine.generate(_BATCH).tokens


def in_torch(model: Path, fluxmoe: dict[str, Any] | None) -> Found:
    """Continue the prompts with ``transformers``, in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        tokens = pool.submit(_tokens, model, fluxmoe).result()
        return cached(model), tokens


def _tokens(model: Path, fluxmoe: dict[str, Any] | None) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    from fluxmoe import load

    torch.set_num_threads(1)
    with ExitStack() as stack:
        if fluxmoe is None:
            ready = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        else:
            memory = fluxmoe["memory"]["budget"] - _KV  # torch allocates the KV cache
            ready = stack.enter_context(load(model, memory, stores=fluxmoe["stores"])).model
        answers = []
        for prompt in _BATCH:
            ids = torch.tensor([prompt.tokens])
            out = ready.generate(ids, max_new_tokens=prompt.max_tokens, do_sample=False)
            answers.append(out[0].tolist())
        return answers


def measure(
    model: Path, pages: Path, layers: int, run: Callable[[Path, dict[str, Any] | None], Found]
) -> list[dict[str, Any]]:
    """Load a model three times; return one row per start."""
    slots = layers * _SHAPE["num_experts"] // 3
    fluxmoe = {
        "memory": {"budget": slots * _PAGE + _KV, "kv": {"target": _KV, "max": _KV}},
        "stores": [{"kind": "file", "path": str(pages)}],
    }
    rows: list[dict[str, Any]] = []
    answers = []
    for name, settings in (
        ("stock", None),
        ("FluxMoE, first start", fluxmoe),
        ("FluxMoE, second start", fluxmoe),
    ):
        forget(model)
        started = time.monotonic()
        with Peak() as peak:
            read, tokens = run(model, settings)
        answers.append(tokens)
        rows.append(
            {
                "engine": name,
                "peak_bytes": peak.nbytes,
                "read_bytes": read,
                "seconds": time.monotonic() - started,
                "identical": answers[-1] == answers[0],
            }
        )
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("loading", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=("vllm", "torch"), default="vllm")
    parser.add_argument("--gib", type=float, default=1.0, help="size of all experts")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write JSON with the machine")
    arguments = parser.parse_args(argv)
    layers = max(int(arguments.gib * 2**30 / _PAGE / _SHAPE["num_experts"]), 1)
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.write(
            Path(folder, "model"), "qwen3-moe", num_hidden_layers=layers, **_SHAPE
        )
        run = in_vllm if arguments.backend == "vllm" else in_torch
        rows = measure(model, Path(folder, "pages"), layers, run)
    size = layers * _SHAPE["num_experts"] * _PAGE
    table = Table(title=f"{size / 2**20:.0f} MiB of experts", title_justify="left")
    for column in ("engine", "peak MiB", "read MiB", "seconds", "tokens"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for row in rows:
        table.add_row(
            row["engine"],
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['read_bytes'] / 2**20:.0f}",
            f"{row['seconds']:.0f}",
            "identical" if row["identical"] else "differ",
        )
    Console().print(table)
    if arguments.save:
        machine.save(arguments.save, {"experts_bytes": size, "rows": rows})
