"""``preset: off`` is stock vLLM; ``budget: auto`` is resolved to a size."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fluxmoe.backends.budget import SHARE
from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.errors import BudgetTooSmallError, UnsupportedError
from fluxmoe.testing import checkpoints
from tests.vllm.conftest import EAGER, KV_BYTES, PAGE, PAGES, Outputs, outputs, prompts

pytestmark = pytest.mark.vllm

OFF = {"memory": {"budget": PAGES * PAGE + KV_BYTES}, "preset": "off", "eviction": "lru"}


def test_off_is_stock_with_the_same_budget(eager: ChildEngine, stock_outputs: Outputs) -> None:
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **EAGER)
    stock = eager.info["kv_blocks"]
    eager.restart(fluxmoe=OFF, **EAGER)
    assert eager.info["kv_blocks"] == stock > 0
    assert outputs(eager) == stock_outputs
    with pytest.raises(UnsupportedError, match="paging is off"):
        eager.call("stats")
    less = {**OFF, "memory": {**OFF["memory"], "kv": {"max": KV_BYTES // 2}}}
    eager.restart(fluxmoe=less, **EAGER)
    assert eager.info["kv_blocks"] == stock // 2
    with pytest.raises(BudgetTooSmallError, match=r"without paging: .* for all experts"):
        eager.restart(fluxmoe={**OFF, "memory": {"budget": PAGES * PAGE}}, **EAGER)


def test_off_serves_what_cannot_be_paged(borrowed: ChildEngine, tmp_path: Path) -> None:
    dense = checkpoints.write(tmp_path / "dense", "qwen3-dense")
    borrowed.restart(model=dense, fluxmoe=OFF, **EAGER)
    assert len(borrowed.generate(prompts(2)).tokens) == 2


def test_an_automatic_budget(eager: ChildEngine, stock_outputs: Outputs) -> None:
    # The budget is about half of the free memory, but the KV cache is as small as in other tests.
    memory = {"budget": "auto", "kv": {"max": KV_BYTES}}
    eager.restart(fluxmoe={"memory": memory}, **EAGER)
    assert outputs(eager) == stock_outputs
    budget = eager.call("stats")["budget_bytes"]
    assert 1 << 20 < budget < psutil.virtual_memory().total * SHARE
