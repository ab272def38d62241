"""Banks with fewer slots than a layer has experts: waves of tokens do not change the output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxmoe import errors
from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.backends.vllm.child.traces import record
from fluxmoe.sim.simulator import simulate
from fluxmoe.testing import checkpoints
from tests.recorded import COUNTERS
from tests.vllm.conftest import EAGER, KV_BYTES, OPTIONS, Outputs, config, outputs, prompts

pytestmark = pytest.mark.vllm

TOP_K, EXPERTS = 4, 16


def swap_waves(worker: Any) -> None:
    """Make every wave except the first compute with the slots of the previous wave."""
    from fluxmoe.backends import op

    kernels = op._kernels[worker._handle]
    before: list[Any] = []

    def faulty(kernel: Any) -> Any:
        def compute(out: Any, x: Any, weights: Any, ids: Any, slots: Any) -> None:
            stale = before[-1] if before and before[-1].shape == slots.shape else slots
            before.append(slots)
            kernel(out, x, weights, ids, stale)

        return compute

    for layer, kernel in kernels.items():
        kernels[layer] = faulty(kernel)


@pytest.mark.parametrize("slots", [TOP_K, 2 * TOP_K])
def test_eager(eager: ChildEngine, stock_outputs: Outputs, slots: int) -> None:
    eager.restart(fluxmoe=config(slots, prefetch="next-layer"), **EAGER)
    assert outputs(eager) == stock_outputs
    stats = eager.call("stats")
    assert (stats["slots"], stats["policy_faults"]) == (slots, 0)
    assert stats["reloads"] > 0
    eager.call("rpc", "fluxmoe_check")


def test_a_wave_with_the_slots_of_another_is_noticed(
    eager: ChildEngine, stock_outputs: Outputs
) -> None:
    eager.restart(fluxmoe=config(TOP_K), **EAGER)
    eager.call("rpc", swap_waves)
    assert outputs(eager) != stock_outputs


def test_the_simulator_counts_what_the_engine_counted(eager: ChildEngine, tmp_path: Path) -> None:
    slots, trace = TOP_K + 1, tmp_path / "t.parquet"
    eager.restart(fluxmoe=config(slots), **EAGER)
    stats = record(eager, prompts(24, seed=3), trace, batch=64)
    result = simulate(trace, "next-use", slots).to_json()
    counters = (*COUNTERS, "reloads")
    assert {c: result[c] for c in counters} == {c: stats[c] for c in counters}
    assert stats["reloads"] > 100


def test_fewer_slots_than_one_token_needs_are_refused(eager: ChildEngine) -> None:
    with pytest.raises(errors.ConfigError, match=f"the {TOP_K} experts of one token"):
        eager.restart(fluxmoe=config(TOP_K - 1), **EAGER)
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **EAGER)


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ChildEngine, Outputs]]:
    """A compiled engine and stock's answers; only GLM4-MoE reveals an op that mutates its input."""
    folder = checkpoints.write(tmp_path_factory.mktemp(request.param) / "model", request.param)
    with ChildEngine(folder, kv_cache_memory_bytes=KV_BYTES, **OPTIONS) as engine:
        yield engine, outputs(engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "slots"),
    [
        ("qwen3-moe", TOP_K),
        pytest.param("qwen3-moe", 2 * TOP_K, marks=pytest.mark.full),
        pytest.param("glm4-moe", TOP_K, marks=pytest.mark.full),
        pytest.param("glm4-moe", 2 * TOP_K, marks=pytest.mark.full),
    ],
    indirect=["compiled"],
)
def test_compiled(compiled: tuple[ChildEngine, Outputs], slots: int) -> None:
    engine, stock = compiled
    engine.restart(fluxmoe=config(slots), **OPTIONS)
    assert outputs(engine) == stock
    stats = engine.call("stats")
    assert stats["slots"] == slots
    assert stats["reloads"] > 0
