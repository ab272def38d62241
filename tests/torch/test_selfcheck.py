"""``page`` and ``load`` refuse an experts implementation whose result depends on the slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxmoe
from fluxmoe import machine
from fluxmoe.backends.torch import experts, twin
from fluxmoe.errors import UnsupportedError
from tests.torch.conftest import Load, answer, same


def in_slot_order(compute: Any) -> Any:
    """Make a kernel sum a token's experts in slot order, as a kernel that sorts slots might."""

    def faulty(module: Any, states: Any, slots: Any, weights: Any) -> torch.Tensor:
        order = slots.argsort(-1)
        return compute(module, states, slots.gather(-1, order), weights.gather(-1, order))

    return faulty


def break_kernel(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    if implementation == twin.EAGER:
        monkeypatch.setattr(twin.ByExpert, "__getitem__", lambda self, expert: self.arena[expert])
    else:
        faulty = in_slot_order(twin.BY_SLOT[implementation])
        monkeypatch.setitem(twin.BY_SLOT, implementation, faulty)


@pytest.mark.parametrize("implementation", twin.IMPLEMENTATIONS)
@pytest.mark.parametrize("way", ["page", "load"])
def test_a_faulty_kernel_is_refused(
    load: Load,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    implementation: str,
    way: str,
) -> None:
    model = load("qwen3-moe", implementation)
    stock = answer(model)
    options = {"experts_implementation": implementation}

    def start() -> fluxmoe.PagedModel:
        if way == "page":
            return fluxmoe.page(model, "1MiB")
        return fluxmoe.load(checkpoint("qwen3-moe"), "1MiB", options=options)

    with monkeypatch.context() as patch:
        break_kernel(patch, implementation)
        with pytest.raises(UnsupportedError) as caught:
            start()
    error = caught.value
    assert f"the MoE kernel {implementation} of Qwen3MoeExperts" in error.what
    assert machine.processor() in error.where
    others = {*twin.IMPLEMENTATIONS} - {implementation}
    assert all(name in error.fix for name in others)
    assert same(answer(model), stock)
    with start() as paged:
        assert same(answer(paged.model), stock)


@pytest.mark.parametrize("implementation", twin.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_types_pass(load: Load, implementation: str, dtype: torch.dtype) -> None:
    model = load("qwen3-moe", implementation, dtype=dtype)
    module = next(module for module in model.modules() if hasattr(module, "gate_up_proj"))
    found = experts.require_sound(module, implementation)
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.milliseconds > 0


def test_a_kernel_that_fails_without_fluxmoe_too(load: Load) -> None:
    model = load("qwen3-moe", "grouped_mm", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="got Double"):
        answer(model)
    with pytest.raises(UnsupportedError, match=r"even without FluxMoE: .*got Double") as caught:
        fluxmoe.page(model, "4MiB")
    assert "eager" in caught.value.fix


def test_a_users_hook_in_another_layer_is_not_called(load: Load) -> None:
    model = load("qwen3-moe", "eager")
    called: list[object] = []
    for layer in (0, 2):
        act_fn = model.model.layers[layer].mlp.experts.act_fn
        act_fn.register_forward_hook(lambda *_: called.append(None))
    with fluxmoe.page(model, "1MiB"):
        assert called == []
