"""``gate`` in a paged model: the next layer's router runs ahead, as in the simulator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fluxmoe
from fluxmoe import errors
from fluxmoe.backends.torch import twin
from fluxmoe.sim.simulator import simulate
from tests.recorded import COUNTERS
from tests.torch.conftest import Load, answer, same, sizes


def half(model: torch.nn.Module) -> int:
    """Return the memory for half of a model's pages."""
    _, pages, page_bytes = sizes(model)
    return pages // 2 * page_bytes


@pytest.mark.parametrize("implementation", twin.IMPLEMENTATIONS)
def test_identity_and_the_simulators_counters(
    load: Load, tmp_path: Path, implementation: str
) -> None:
    model = load("qwen3-moe", implementation)
    stock = answer(model)
    with fluxmoe.page(model, half(model), eviction="lru", prefetch="gate") as paged:
        with paged.record(tmp_path / "t.parquet", predict=True):
            assert same(answer(model), stock)
        stats = paged.stats()
        assert stats["prefetch_hits"] > 0
        result = simulate(tmp_path / "t.parquet", "lru", stats["slots"], "gate").to_json()
        assert {c: result[c] for c in COUNTERS} == {c: stats[c] for c in COUNTERS}
        # After the recording, predictions go on.
        assert same(answer(model), stock)
        assert paged.stats()["loads_prefetch"] > stats["loads_prefetch"]
    assert same(answer(model), stock)


def test_predictions_are_those_of_the_next_layers_router(load: Load, tmp_path: Path) -> None:
    """A router that always chooses the same experts is predicted without a fault."""
    model = load()
    gate = model.model.layers[2].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
    with fluxmoe.page(model, half(model), eviction="lru", prefetch="gate") as paged:
        answer(model)  # loads the experts that the other layers do not evict
        with paged.record(tmp_path / "t.parquet", predict=True):
            answer(model)
    events = fluxmoe.trace.TraceReader(tmp_path / "t.parquet").blocks(predicted=True)
    for block in events:
        for at in range(len(block.step)):
            if block.layer[at] == 1:
                guesses = block.guesses[block.guess_offsets[at] : block.guess_offsets[at + 1]]
                routed = block.ids[block.offsets[at + 1] : block.offsets[at + 2]]
                assert set(guesses.tolist()) == set(routed.tolist())


def test_gate_needs_a_router(load: Load) -> None:
    model = load()
    stock = answer(model)
    block = model.model.layers[1].mlp
    gate, block.gate = block.gate, torch.nn.Identity()
    with pytest.raises(
        errors.UnsupportedError, match=r"no router `gate` .*another prefetch policy"
    ):
        fluxmoe.page(model, half(model), prefetch="gate")
    block.gate = gate
    assert same(answer(model), stock)


def test_a_users_router_does_not_run_ahead(load: Load) -> None:
    """It could draw random numbers or count its calls."""
    model = load()
    gate = model.model.layers[1].mlp.gate

    class Noisy(type(gate)):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor) -> object:
            return super().forward(hidden + torch.randn_like(hidden))

    gate.__class__ = Noisy
    with pytest.raises(errors.UnsupportedError, match="no router `gate`"):
        fluxmoe.page(model, half(model), prefetch="gate")
    with (
        fluxmoe.page(model, half(model)) as paged,
        pytest.raises(errors.UnsupportedError, match="record without --predict"),
        paged.record("never.parquet", predict=True),
    ):
        pass


def test_in_training_mode_nothing_is_predicted(load: Load) -> None:
    model = load().train()
    stock = answer(model)
    with fluxmoe.page(model, half(model), prefetch="gate") as paged:
        assert same(answer(model), stock)
        assert paged.stats()["loads_prefetch"] == 0


@pytest.mark.slow
def test_a_compiled_model(load: Load) -> None:
    model = load(implementation="batched_mm")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        stock = torch.compile(model)(ids, use_cache=False).logits
        torch.compiler.reset()
        with fluxmoe.page(model, half(model), eviction="lru", prefetch="gate") as paged:
            assert torch.equal(torch.compile(model)(ids, use_cache=False).logits, stock)
            assert paged.stats()["loads_prefetch"] > 0
