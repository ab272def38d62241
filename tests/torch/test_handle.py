"""The handle's data and methods, and the complete removal of paging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

import fluxmoe
from fluxmoe import errors
from fluxmoe.backends.torch import layout
from fluxmoe.core.types import Phase
from fluxmoe.sim.simulator import simulate
from fluxmoe.sizes import at_least
from fluxmoe.trace import TraceReader
from tests.torch.conftest import Load, answer, held, prompts, same, sizes


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_close_puts_everything_back(load: Load, implementation: str) -> None:
    model = load("qwen2-moe", implementation)
    stock, before = answer(model), held()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for _ in range(3):
        paged = fluxmoe.page(model, "2MiB", prefetch="next-layer")
        answer(model)
        assert held() > before
        paged.close()
        paged.close()
        assert paged.closed
        assert held() == before
    assert model.config._experts_implementation == implementation
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == parameters
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert same(answer(model), stock)
    with pytest.raises(errors.ConfigError, match="closed"):
        paged.stats()


def test_a_model_that_is_dropped_takes_its_arenas_with_it(load: Load) -> None:
    before = held()
    model = load()
    fluxmoe.page(model, "2MiB")
    answer(model)  # the handle is gone, but the model is still paged
    assert held() > before
    part = model.model.layers[1]
    del model
    assert held() > before  # a layer that is still referenced can still read its arenas
    del part
    assert held() == before


def test_two_models_at_once(load: Load) -> None:
    one, other = load("qwen3-moe", "eager"), load("mixtral")
    stock = answer(one), answer(other)
    with fluxmoe.page(one, "1MiB") as first, fluxmoe.page(other, "1MiB") as second:
        assert same(answer(one), stock[0])
        assert same(answer(other), stock[1])
        assert first.stats()["pages"] != second.stats()["pages"]


def test_stats(load: Load) -> None:
    model = load()
    with fluxmoe.page(model, "1MiB") as paged:
        assert paged.stats()["accesses"] == 0
        answer(model)
        stats = paged.stats()
        assert stats["hits"] + stats["misses"] == stats["accesses"]
        assert stats["hit_rate"] == stats["hits"] / stats["accesses"]
        assert stats["bytes_demand"] == stats["loads_demand"] * stats["page_bytes"]
        assert stats["expert_bytes"] <= 1 << 20
        assert stats["store_bytes"] == stats["pages"] * stats["page_bytes"]
        assert (stats["policy_faults"], stats["banks"]) == (0, 1)
        paged.reset()
        assert paged.stats()["accesses"] == 0


@pytest.mark.parametrize("policy", ["immediate", "lru", "lfu", "lfru", "next-use"])
def test_a_recorded_trace_replays_to_the_same_counters(
    load: Load, tmp_path: Path, policy: str
) -> None:
    model = load("glm4-moe")
    trace = tmp_path / "trace.parquet"
    with fluxmoe.page(model, "1536KiB", eviction=policy, prefetch="next-layer") as paged:
        answer(model)
        paged.reset()
        with paged.record(trace):
            answer(model)
            with pytest.raises(errors.ConfigError, match="already active"):
                paged.record(trace).__enter__()
        stats = paged.stats()
    result = simulate(trace, policy, stats["slots"], "next-layer").to_json()
    shared = result.keys() & stats.keys()
    assert len(shared) >= 10
    assert {key: result[key] for key in shared} == {key: stats[key] for key in shared}
    reader = TraceReader(trace)
    assert (reader.meta.source, reader.meta.top_k) == ("torch", 4)
    phases = [phase for _, layer, phase, _ in reader.events() if layer == 0]
    assert phases == [Phase.PREFILL, Phase.PREFILL, *[Phase.DECODE] * 7]


def test_a_failing_policy_is_contained(load: Load, tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "import fluxmoe\n"
        "class Broken(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages):\n"
        "        raise RuntimeError('no')\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register):\n"
        "    register('broken', Broken)\n"
    )
    model = load()
    stock = answer(model)
    with fluxmoe.page(model, "1MiB", eviction="broken", plugins=[str(plugin)]) as paged:
        assert same(answer(model), stock)
        assert paged.stats()["policy_faults"] > 0


def test_without_no_grad(load: Load) -> None:
    model = load()
    with (
        fluxmoe.page(model),
        pytest.raises(errors.UnsupportedError, match=r"torch\.no_grad"),
    ):
        model(**prompts())


def test_dense_models(checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3-dense"))
    with pytest.raises(errors.NoExpertsError, match="no MoE layers"):
        fluxmoe.page(model)


def test_transposed_experts() -> None:
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(errors.UnsupportedError, match=r"transposed.*Mixtral"):
        fluxmoe.page(GptOssForCausalLM(config))


def test_an_implementation_that_knows_no_slots(load: Load) -> None:
    with pytest.raises(errors.UnsupportedError, match=r"sonicmoe.*grouped_mm"):
        fluxmoe.page(load("qwen3-moe", "sonicmoe"))


def test_paging_twice(load: Load) -> None:
    model = load()
    with (
        fluxmoe.page(model),
        pytest.raises(errors.ConfigError, match="already paged"),
    ):
        fluxmoe.page(model)


def test_a_config_shared_with_a_model_that_is_not_paged(load: Load) -> None:
    model = load()
    twin = AutoModelForCausalLM.from_config(model.config)
    with (
        fluxmoe.page(model),
        torch.no_grad(),
        pytest.raises(errors.UnsupportedError, match="share its config"),
    ):
        twin(**prompts())


class Derived(Dots1ForCausalLM):
    """A class whose source hides the experts interface from transformers."""


def test_a_class_that_does_not_let_the_implementation_be_chosen() -> None:
    config = Dots1Config(
        vocab_size=1024, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=0, n_group=1, topk_group=1,
    )  # fmt: skip
    model = Derived(config).eval()
    stock, before = answer(model), held()
    with pytest.raises(errors.UnsupportedError, match="Derived does not let"):
        fluxmoe.page(model)
    assert held() == before
    assert same(answer(model), stock)


def test_wrong_arguments(load: Load) -> None:
    model = load()
    before = held()
    least = layout.top_k_of(layout.experts_of(model)[0]) * sizes(model)[2]
    with pytest.raises(errors.BudgetTooSmallError, match=f"at least {at_least(least)}"):
        fluxmoe.page(model, least - 1)
    with pytest.raises(errors.ConfigError, match="plenty"):
        fluxmoe.page(model, "plenty")
    with pytest.raises(errors.UnknownPolicyError, match="lru"):
        fluxmoe.page(model, eviction="lur")
    with pytest.raises(errors.NeedsFutureError):
        fluxmoe.page(model, eviction="belady")
    with pytest.raises(errors.UnsupportedError, match="Block is not a model"):
        fluxmoe.page(model.model.layers[0].mlp)
    assert held() == before
    assert same(answer(model), answer(load()))


@pytest.mark.parametrize("loaded", [False, True])
def test_an_interrupted_close_can_be_repeated(
    load: Load, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    stock = load()
    right = answer(stock)
    before = held()
    paged = fluxmoe.load(checkpoint(), "1MiB") if loaded else fluxmoe.page(load(), "1MiB")
    model = paged.model
    del model._apply, model.model.layers[0].mlp.experts.__dict__["__getstate__"]
    with monkeypatch.context() as patch, pytest.raises(SystemError, match="injected"):
        patch.setattr(type(model), "set_experts_implementation", _fail)
        paged.close()
    assert not paged.closed
    paged.close()
    assert paged.closed
    if not loaded:
        assert same(answer(model), right)
    del paged
    assert held() == before


def _fail(*_: object) -> None:
    raise SystemError("injected")
