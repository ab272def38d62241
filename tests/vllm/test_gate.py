"""``gate`` under vLLM: each layer's router runs one layer ahead, and the output does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fluxmoe import errors
from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.backends.vllm.child.traces import record
from fluxmoe.sim.simulator import simulate
from fluxmoe.testing import checkpoints
from fluxmoe.trace import TraceReader
from tests.recorded import COUNTERS
from tests.vllm.conftest import EAGER, KV_BYTES, OPTIONS, Outputs, config, outputs, prompts

pytestmark = pytest.mark.vllm

#: Half of the pages, and fewer slots than a layer has experts.
SLOTS, FEW = 32, 8


@pytest.mark.parametrize("slots", [SLOTS, FEW])
def test_eager(eager: ChildEngine, stock_outputs: Outputs, slots: int) -> None:
    eager.restart(fluxmoe=config(slots, prefetch="gate"), **EAGER)
    assert outputs(eager) == stock_outputs
    stats = eager.call("stats")
    assert stats["policy_faults"] == 0
    assert slots == FEW or stats["prefetch_hits"] > 0


def test_the_simulator_counts_what_the_engine_counted(eager: ChildEngine, tmp_path: Path) -> None:
    trace = tmp_path / "t.parquet"
    eager.restart(fluxmoe=config(SLOTS, prefetch="gate"), **EAGER)
    stats = record(eager, prompts(24, seed=3), trace, batch=8)
    result = simulate(trace, "next-use", SLOTS, "gate").to_json()
    assert {c: result[c] for c in COUNTERS} == {c: stats[c] for c in COUNTERS}
    assert stats["prefetch_hits"] > 100


def constant(worker: Any) -> None:
    """Make the router of the second layer choose the same experts for all tokens."""
    worker.model_runner.model.model.layers[1].mlp.gate.weight.data.zero_()


def test_predictions_are_those_of_the_next_layers_router(
    eager: ChildEngine, tmp_path: Path
) -> None:
    trace = tmp_path / "t.parquet"
    eager.restart(fluxmoe=config(SLOTS, prefetch="gate"), **EAGER)
    eager.call("rpc", constant)
    record(eager, prompts(4, seed=3), trace, batch=4)
    for block in TraceReader(trace).blocks(predicted=True):
        for at in (block.layer == 0).nonzero()[0]:
            guesses = block.guesses[block.guess_offsets[at] : block.guess_offsets[at + 1]]
            routed = block.ids[block.offsets[at + 1] : block.offsets[at + 2]]
            assert set(guesses.tolist()) == set(routed.tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    ["qwen3-moe", *(pytest.param(a, marks=pytest.mark.full) for a in ("glm4-moe", "mixtral"))],
)
def test_compiled(architecture: str, tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "model", architecture)
    with ChildEngine(folder, kv_cache_memory_bytes=KV_BYTES, **OPTIONS) as engine:
        stock = outputs(engine)
        engine.restart(fluxmoe=config(SLOTS, prefetch="gate"), **OPTIONS)
        assert outputs(engine) == stock
        assert engine.call("stats")["prefetch_hits"] > 0


def hide_router(worker: Any) -> None:
    """Look for the routers of a model that has none by their usual name."""
    from fluxmoe.backends.vllm.worker.layer import PagedRoutedExperts
    from fluxmoe.backends.vllm.worker.lookahead import predict_next

    model = worker.model_runner.model
    layers = [module for module in model.modules() if isinstance(module, PagedRoutedExperts)]
    predict_next(layers[0], layers, worker._handle)


def test_a_model_without_known_routers_is_refused(eager: ChildEngine) -> None:
    eager.restart(fluxmoe=config(SLOTS), **EAGER)
    with pytest.raises(errors.UnsupportedError, match="has no router `gate`"):
        eager.call("rpc", hide_router)
