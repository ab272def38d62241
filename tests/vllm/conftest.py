"""Real vLLM on random checkpoints; engines run in child processes and are reused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.testing import checkpoints

OPTIONS = {"max_model_len": 256, "max_num_seqs": 64, "block_size": 32}
EAGER = {**OPTIONS, "enforce_eager": True}
KV_BYTES = 8 << 20


def prompts(count: int, *, tokens: int = 20, seed: int = 0) -> list[Prompt]:
    """Make requests of mixed lengths; every second request samples with a seed, others greedily."""
    rng = random.Random(seed)
    return [
        Prompt(
            [rng.randrange(3, 1000) for _ in range(rng.randint(1, 40))],
            rng.randint(tokens // 2, tokens),
            temperature=1.0 if index % 2 else 0.0,
            seed=index,
            logprobs=True,
        )
        for index in range(count)
    ]


#: Bytes of a page, and number of pages, of the small Qwen3-MoE.
PAGE = 3 * 128 * 64 * 2
PAGES = 64


def config(slots: int, **settings: Any) -> dict[str, Any]:
    """Make a budget whose experts get exactly ``slots`` slots (frames are smaller than a part)."""
    memory = {
        "budget": slots * PAGE + KV_BYTES,
        "frame": 4096,
        "experts": {"target": slots * PAGE},
        **settings.pop("memory", {}),
    }
    return {"memory": memory, **settings}


#: 73 sequences in batches of 1, 8 and 64.
BATCHES = [prompts(1, seed=1), prompts(8, seed=8), prompts(64, seed=64)]


#: Tokens, and the log-probability of each token, by batch and request. One wrong page can leave
#: every token unchanged, but hardly every bit of the log-probabilities (docs/project/adr/0001).
Outputs = list[tuple[list[list[int]], list[list[float]]]]


def outputs(engine: ChildEngine) -> Outputs:
    runs = [engine.generate(batch) for batch in BATCHES]
    return [(run.tokens, run.logprobs) for run in runs]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint with 4 layers of 16 experts."""
    return checkpoints.write(tmp_path_factory.mktemp("qwen3") / "model", "qwen3-moe")


@pytest.fixture(scope="session")
def eager(checkpoint: Path) -> Iterator[ChildEngine]:
    """A child process with an eager engine, which each test restarts as needed."""
    with ChildEngine(checkpoint, kv_cache_memory_bytes=KV_BYTES, **EAGER) as engine:
        yield engine


@pytest.fixture
def borrowed(eager: ChildEngine, checkpoint: Path) -> Iterator[ChildEngine]:
    """``eager`` for a test that restarts the engine with another model; restored afterwards."""
    yield eager
    eager.restart(model=checkpoint, kv_cache_memory_bytes=KV_BYTES, **EAGER)


@pytest.fixture(scope="session")
def stock_outputs(eager: ChildEngine) -> Outputs:
    """Answers of eager stock vLLM to ``BATCHES``."""
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **EAGER)
    return outputs(eager)
