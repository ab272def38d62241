"""Other architectures, and compiled engines: each against stock in the same mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxmoe.backends.vllm.child import ChildEngine
from fluxmoe.testing import checkpoints
from tests.vllm.conftest import EAGER, EXPERTS, KV_BYTES, OPTIONS, PAGES, config, outputs

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "qwen2-moe", "glm4-moe"])
def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    model = checkpoints.write(tmp_path, architecture)
    fluxmoe = {"memory": {"budget": KV_BYTES + (2 << 20), "experts": {"target": "1536KiB"}}}
    with ChildEngine(model, kv_cache_memory_bytes=KV_BYTES, **EAGER) as engine:
        expected = outputs(engine)
        engine.restart(fluxmoe=fluxmoe, **EAGER)
        assert outputs(engine) == expected
        stats = engine.call("stats")
        assert stats["slots"] < stats["pages"]
        assert stats["evictions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3-moe", "glm4-moe"])
def test_compiled_equals_compiled_stock(tmp_path: Path, architecture: str) -> None:
    """GLM4-MoE: a shared expert, a dense first layer, and a router in fp32 (docs/adr/0001)."""
    model = checkpoints.write(tmp_path, architecture)
    with ChildEngine(model, kv_cache_memory_bytes=KV_BYTES, **OPTIONS) as engine:
        expected = outputs(engine)
        for slots, settings in (
            (EXPERTS, {}),
            (PAGES // 2, {"eviction": "lru", "prefetch": "next-layer"}),
        ):
            engine.restart(fluxmoe=config(slots, **settings), **OPTIONS)
            assert outputs(engine) == expected
            assert engine.call("stats")["evictions"] > 0
