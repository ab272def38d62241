"""Traces recorded from Hugging Face models: correct routing, and agreement with the simulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxmoe
from fluxmoe import errors
from fluxmoe.core.types import Phase
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import TraceReader
from tests.recorded import COUNTERS, POLICIES, table
from tests.torch.conftest import Load, answer, prompts, same


@pytest.mark.parametrize("prefetch", ["none", "next-layer"])
def test_the_simulator_counts_what_the_engine_counted(
    load: Load, tmp_path: Path, prefetch: str
) -> None:
    model = load("glm4-moe")
    assert len(POLICIES) >= 5
    for policy in POLICIES:
        trace = tmp_path / f"{policy}.parquet"
        with fluxmoe.page(model, "1536KiB", eviction=policy, prefetch=prefetch) as paged:
            answer(model)  # not recorded
            paged.reset()
            with paged.record(trace):
                answer(model)
            stats = paged.stats()
        result = simulate(trace, policy, stats["slots"], prefetch).to_json()
        assert {c: result[c] for c in COUNTERS} == {c: stats[c] for c in COUNTERS}, policy
        assert 0 < stats["misses"] <= stats["accesses"] and stats["policy_faults"] == 0


def test_tokens_requests_and_phases(load: Load, tmp_path: Path) -> None:
    model, trace = load(), tmp_path / "t.parquet"
    with fluxmoe.page(model) as paged, paged.record(trace) as recorder:
        answer(model, new_tokens=3)  # passes of 3 × 10, 3 × 10, 3 and 3 tokens
        recorder.first_request = 3
        answer(model, new_tokens=1)
    rows = [row for row in table(trace) if row["layer"] == 0]
    steps = [[row for row in rows if row["step"] == step] for step in range(6)]
    assert [len(step) for step in steps] == [30, 30, 3, 3, 30, 30]
    for step, phase, first in zip(steps, [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 3, 3], strict=True):
        assert {row["phase"] for row in step} == {phase}
        length = len(step) // 3
        assert [row["token"] for row in step] == list(range(len(step)))
        assert [row["request"] for row in step] == [
            first + r for r in range(3) for _ in range(length)
        ]
    assert {row["layer"] for row in table(trace)} == set(range(len(paged._layers)))


def test_weights_are_those_that_the_layer_computes_with(load: Load, tmp_path: Path) -> None:
    model, trace = load("mixtral", "eager"), tmp_path / "t.parquet"
    seen = []
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda module, args, out: seen.append(out[1:]))
    stock = answer(model)
    seen.clear()
    with fluxmoe.page(model) as paged, paged.record(trace, weights=True):
        assert same(answer(model), stock)
    rows = [row for row in table(trace) if row["layer"] == 0]
    ids = torch.cat([ids for _, ids in seen])
    weights = torch.cat([weights for weights, _ in seen]).to(torch.float16)
    assert [row["experts"] for row in rows] == ids.tolist()
    assert [row["weights"] for row in rows] == weights.tolist()
    assert "predicted" not in rows[0]


@pytest.mark.parametrize(
    "architecture",
    ["mixtral", "olmoe", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3", "glm4-moe"],
)
def test_predictions_are_the_next_routers_on_this_layers_states(
    load: Load, tmp_path: Path, architecture: str
) -> None:
    model, trace = load(architecture), tmp_path / "t.parquet"
    stock = answer(model)
    with fluxmoe.page(model) as paged, paged.record(trace, predict=True) as recorder:
        layers = paged._layers
        states: dict[int, list[torch.Tensor]] = {}
        routed: list[int] = []
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(
                lambda module, args, index=index: states.setdefault(index, []).append(args[0])
            )
        blocks = [m for m in model.modules() if any(c in layers for c in m.children())]
        for block in blocks:
            block.gate.register_forward_hook(lambda *_: routed.append(1))
        assert same(answer(model), stock)
        assert recorder.columns == ("predicted",)
    # The routers' hooks ran only once per layer and pass, because prediction bypasses the hooks.
    assert len(routed) == sum(len(passes) for passes in states.values())
    rows = table(trace)
    for index in range(len(layers) - 1):
        with torch.no_grad():
            expected = torch.cat([blocks[index + 1].gate(x)[-1] for x in states[index]])
        mine = [row["predicted"] for row in rows if row["layer"] == index]
        assert [sorted(p) for p in mine] == [sorted(p) for p in expected.tolist()]
    assert all(row["predicted"] == [] for row in rows if row["layer"] == len(layers) - 1)
    offsets, ids = Events.load(trace).predicted  # type: ignore[misc]
    assert len(ids) == sum(len(row["predicted"]) for row in rows)
    assert len(offsets) == TraceReader(trace).num_rows or len(offsets) > len(layers)


def test_max_steps(load: Load, tmp_path: Path) -> None:
    model, trace = load(), tmp_path / "t.parquet"
    with fluxmoe.page(model) as paged, paged.record(trace, max_steps=4) as recorder:
        answer(model, new_tokens=2)
        assert not recorder.done
        answer(model, new_tokens=4)
        assert recorder.done
    assert sorted({row["step"] for row in table(trace)}) == [0, 1, 2, 3]


def test_a_compiled_model_records_the_same(load: Load, tmp_path: Path) -> None:
    model = load()
    with fluxmoe.page(model) as paged, torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with paged.record(tmp_path / "eager", predict=True):
            model(**prompts())
        with paged.record(tmp_path / "compiled", predict=True):
            stock = compiled(**prompts()).logits
        # A second use of the weights would change the compiled model's output.
        with (
            pytest.raises(errors.TraceError, match="lacks weights"),
            paged.record(tmp_path / "weights", weights=True),
        ):
            assert torch.equal(compiled(**prompts()).logits, stock)
    eager, other = table(tmp_path / "eager"), table(tmp_path / "compiled")
    for name in ("step", "layer", "token", "experts", "predicted"):
        assert [row[name] for row in eager] == [row[name] for row in other], name


def test_b10_an_existing_file_and_one_that_fails(load: Load, tmp_path: Path) -> None:
    model, trace = load(), tmp_path / "t.parquet"
    trace.write_text("precious")
    with fluxmoe.page(model) as paged:
        with (
            pytest.raises(errors.ConfigError, match=r"already exists.*replace=True"),
            paged.record(trace),
        ):
            raise AssertionError("began")
        with pytest.raises(errors.TraceError, match="no events"), paged.record(trace, replace=True):
            pass
        with pytest.raises(ZeroDivisionError), paged.record(trace, replace=True):
            answer(model)
            raise ZeroDivisionError
        assert trace.read_text() == "precious"
        assert [path.name for path in tmp_path.iterdir()] == [trace.name]
        with paged.record(trace, replace=True):
            answer(model)
    assert TraceReader(trace).num_rows > 0


def test_closing_the_handle_ends_the_recording(load: Load, tmp_path: Path) -> None:
    model, trace = load(), tmp_path / "t.parquet"
    paged = fluxmoe.page(model)
    with paged.record(trace, weights=True):
        answer(model, new_tokens=1)
        paged.close()
        answer(model)
    assert {row["step"] for row in table(trace)} == {0, 1}


def test_errors_of_writing_end_the_recording_not_the_model(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model = load()
    stock = answer(model)
    with fluxmoe.page(model) as paged:
        with (
            pytest.raises(errors.TraceError, match="No space left"),
            paged.record(tmp_path / "t") as recorder,
        ):
            monkeypatch.setattr(recorder._writer._file, "write_table", refuse)
            assert same(answer(model), stock)
        assert same(answer(model), stock)
    assert list(tmp_path.iterdir()) == []


def test_phases_reach_the_simulator(load: Load, tmp_path: Path) -> None:
    model, trace = load(), tmp_path / "t.parquet"
    with fluxmoe.page(model) as paged, paged.record(trace):
        answer(model, new_tokens=3)
    phases = [phase for _, layer, phase, _ in TraceReader(trace).events() if layer == 0]
    assert phases == [Phase.PREFILL, Phase.PREFILL, Phase.DECODE, Phase.DECODE]
    assert np.unique(Events.load(trace).block.phase).tolist() == [0, 1]
