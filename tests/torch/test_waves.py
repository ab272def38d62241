"""Banks with fewer slots than a layer has experts: waves of tokens do not change the output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fluxmoe
from fluxmoe import errors
from fluxmoe.backends import op
from fluxmoe.backends.torch import twin
from fluxmoe.sim.simulator import simulate
from tests.recorded import COUNTERS
from tests.torch.conftest import Load, answer, same, sizes

TOP_K = 4


@pytest.mark.parametrize("slots", [TOP_K, 2 * TOP_K])
@pytest.mark.parametrize("implementation", twin.IMPLEMENTATIONS)
def test_identity(load: Load, tmp_path: Path, implementation: str, slots: int) -> None:
    model = load("qwen3-moe", implementation, dtype=torch.bfloat16)
    stock, page_bytes = answer(model), sizes(model)[2]
    with fluxmoe.page(model, slots * page_bytes, eviction="lru", copy_threads=0) as paged:
        with paged.record(tmp_path / "t.parquet"):
            assert same(answer(model), stock)
        stats = paged.stats()
        assert stats["slots"] == slots
        assert stats["reloads"] > 0
        result = simulate(tmp_path / "t.parquet", "lru", slots).to_json()
        counters = (*COUNTERS, "reloads")
        assert {c: result[c] for c in counters} == {c: stats[c] for c in counters}
        paged.resize(model.config.num_hidden_layers * 16 * page_bytes)
        assert same(answer(model), stock)
    assert same(answer(model), stock)


def test_a_wave_with_the_slots_of_another_is_noticed(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("qwen3-moe", "batched_mm", dtype=torch.bfloat16)
    stock, page_bytes = answer(model), sizes(model)[2]
    use_kernel = op.use_kernel

    def faulty(handle: int, layer: int, kernel: op.SlotKernel) -> None:
        use_kernel(
            handle,
            layer,
            lambda out, x, weights, ids, slots: kernel(out, x, weights, ids, slots.roll(1, -1)),
        )

    monkeypatch.setattr(op, "use_kernel", faulty)
    with fluxmoe.page(model, TOP_K * page_bytes):
        assert not same(answer(model), stock)


def test_an_implementation_that_depends_on_other_tokens_needs_one_layer(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("qwen3-moe", "batched_mm", dtype=torch.bfloat16)
    compute = twin.BY_SLOT["batched_mm"]

    def faulty(module, states, slots, weights):  # type: ignore[no-untyped-def]
        order = torch.arange(slots.shape[1])
        order = order.flip(0) if len(states) > 20 else order
        return compute(module, states, slots[:, order], weights[:, order])

    monkeypatch.setitem(twin.BY_SLOT, "batched_mm", faulty)
    with pytest.raises(errors.BudgetTooSmallError, match="one layer of 16 experts"):
        fluxmoe.page(model, TOP_K * sizes(model)[2])


def test_a_compiled_model_does_not_run_in_waves(load: Load) -> None:
    model = load("qwen3-moe", "batched_mm", dtype=torch.bfloat16)
    with fluxmoe.page(model, TOP_K * sizes(model)[2]) as paged, torch.no_grad():
        compiled = torch.compile(paged.model, backend="eager")
        with pytest.raises(errors.UnsupportedError, match="cannot run layers in waves"):
            compiled(torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("implementation", twin.IMPLEMENTATIONS)
def test_what_runs_inside_the_experts_stays_as_it_was_checked(
    load: Load, implementation: str
) -> None:
    """A wave contains only some rows, so a hook that combines rows would give other tokens."""
    model = load("qwen3-moe", implementation, dtype=torch.bfloat16)
    stock, page_bytes = answer(model), sizes(model)[2]
    activation = model.model.layers[1].mlp.experts.act_fn
    with fluxmoe.page(model, TOP_K * page_bytes):
        hook = activation.register_forward_hook(lambda module, args, out: out - out.mean(0))
        with pytest.raises(errors.UnsupportedError, match="inside Qwen3MoeExperts was changed"):
            answer(model)
        hook.remove()
        assert same(answer(model), stock)
