"""Operations on a paged model either work as usual or are rejected without side effects."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fluxmoe
from fluxmoe import errors
from tests.torch.conftest import Load, answer, prompts, same, sizes


@pytest.fixture(params=["page", "load"])
def paged(request: pytest.FixtureRequest, load: Load, checkpoint: Callable[..., Path]) -> Any:
    with (
        fluxmoe.page(load(), "1MiB")
        if request.param == "page"
        else fluxmoe.load(checkpoint(), "1MiB") as handle
    ):
        yield handle


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.model, lambda m: m.model.layers[1].mlp])
def test_saving(paged: Any, part: Callable[[Any], Any], tmp_path: Path) -> None:
    module = part(paged.model)
    for save in (
        lambda: module.state_dict(),
        lambda: torch.save(module.state_dict(), tmp_path / "file"),
        lambda: paged.model.save_pretrained(tmp_path / "folder"),
    ):
        with pytest.raises(
            errors.UnsupportedError, match=r"weights cannot be used.*close\(\) its handle"
        ):
            save()
    for duplicate in (
        lambda: copy.deepcopy(module),
        lambda: pickle.dumps(module),
        lambda: torch.save(module, tmp_path / "file"),
    ):
        with pytest.raises(errors.UnsupportedError, match="neither copied nor pickled"):
            duplicate()
    paged.check()


def test_parts_without_experts_are_as_ever(paged: Any, load: Load) -> None:
    norm = copy.deepcopy(paged.model.model.norm)
    assert torch.equal(norm.state_dict()["weight"], load().model.norm.weight)


def test_loading_weights(paged: Any, load: Load) -> None:
    other = load()
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    for module, source in (
        (paged.model, other),
        (paged.model.model.layers[0].mlp, other.model.layers[0].mlp),
    ):
        with pytest.raises(errors.UnsupportedError, match="cannot have weights loaded into it"):
            module.load_state_dict(source.state_dict())
    assert same(answer(paged.model), answer(load()))  # nothing was loaded


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.float32),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("meta"),
        lambda m: m.model.to(torch.float32),
        lambda m: m.model.layers[2].to(torch.float16),
        lambda m: torch.nn.ModuleList([m]).float(),
    ],
)
def test_moving(paged: Any, load: Load, move: Callable[[Any], Any]) -> None:
    types = {name: (w.dtype, w.device) for name, w in paged.model.named_parameters()}
    with pytest.raises(errors.UnsupportedError, match=r"keeps its device.*bfloat16"):
        move(paged.model)
    assert {name: (w.dtype, w.device) for name, w in paged.model.named_parameters()} == types
    assert same(answer(paged.model), answer(load()))


def test_moving_to_where_it_is(paged: Any, load: Load) -> None:
    model = paged.model
    assert model.to("cpu").cpu() is model
    assert same(answer(model), answer(load()))
    model.bfloat16()  # changes the float32 rotary embeddings, as in any model
    assert same(answer(model), answer(load().bfloat16()))


def test_gradients(load: Load) -> None:
    model = load().train()
    stock = answer(model)
    with fluxmoe.page(model, "1MiB"):
        assert same(answer(model), stock)  # without gradients, training mode has no effect
        with pytest.raises(errors.UnsupportedError, match=r"compute gradients.*torch\.no_grad"):
            model(**prompts())
        model.get_input_embeddings().requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.requires_grad_(False)
        with pytest.raises(errors.UnsupportedError, match="compute gradients"):  # the experts' own
            model(**prompts())
        model.requires_grad_(False)
        assert torch.equal(model(**prompts()).logits, stock[1])


def test_sampling(load: Load) -> None:
    model = load()
    ways: list[dict[str, Any]] = [
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
    ]

    def sample() -> list[torch.Tensor]:
        found = []
        for way in ways:
            torch.manual_seed(11)
            found.append(model.generate(**prompts(), max_new_tokens=8, pad_token_id=0, **way))
        return found

    stock = sample()
    assert not torch.equal(stock[0], stock[4])
    with fluxmoe.page(model, "1MiB"):
        assert all(map(torch.equal, sample(), stock))


def test_threads_that_share_a_model_take_turns(load: Load) -> None:
    model = load()
    starts = [torch.randint(3, 1000, (1, 6 + i), generator=torch.Generator().manual_seed(i))
              for i in range(6)]  # fmt: skip

    def run(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)

    stock = list(map(run, starts))
    with fluxmoe.page(model, sizes(model)[0] * sizes(model)[2]) as paged:
        with ThreadPoolExecutor(6) as pool:
            assert all(map(torch.equal, pool.map(run, starts), stock))
        paged.check()


def test_two_models_in_two_threads(load: Load) -> None:
    models = [load("qwen3-moe", "eager"), load("mixtral")]
    stock = list(map(answer, models))
    with fluxmoe.page(models[0], "1MiB") as one, fluxmoe.page(models[1], "2MiB") as other:
        with ThreadPoolExecutor(2) as pool:
            assert all(map(same, pool.map(answer, models), stock))
        one.check()
        other.check()


def test_a_pass_that_fails_leaves_the_turn_to_others(load: Load) -> None:
    model = load()
    stock = answer(model)
    with fluxmoe.page(model, "1MiB"):
        for raised in (ValueError, KeyboardInterrupt):

            def fail(*_: object, raised: type[BaseException] = raised) -> None:
                raise raised

            hook = model.model.layers[2].register_forward_pre_hook(fail)
            with pytest.raises(raised), torch.no_grad():
                model(**prompts())
            hook.remove()
            assert same(answer(model), stock)  # the interrupted thread continues
            with ThreadPoolExecutor(1) as pool:
                assert same(pool.submit(answer, model).result(60), stock)


def test_closing_waits_for_the_pass_that_runs(load: Load) -> None:
    model = load()
    stock = answer(model)
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        begun.set()
        assert go_on.wait(60)

    paged = fluxmoe.page(model, "1MiB")
    hook = model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(lambda: torch.no_grad()(model)(**prompts()).logits)
        assert begun.wait(60)
        closing = pool.submit(paged.close)
        assert not paged.closed
        go_on.set()
        closing.result(60)
        assert torch.equal(running.result(60), stock[1])
    hook.remove()
    assert paged.closed
    assert same(answer(model), stock)


def test_paging_a_part_or_a_whole_of_what_is_paged(paged: Any) -> None:
    for model in (paged.model, paged.model.model):
        with pytest.raises(errors.ConfigError, match="already paged"):
            fluxmoe.page(model)


def test_a_model_without_weights(load: Load) -> None:
    config = load().config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(errors.UnsupportedError, match=r"meta device.*fluxmoe\.load"):
        fluxmoe.page(model)


def test_use_after_close(load: Load, tmp_path: Path) -> None:
    paged = fluxmoe.page(load(), "1MiB")
    paged.close()
    for use in (
        paged.stats,
        paged.reset,
        paged.check,
        lambda: paged.resize("2MiB"),
        lambda: paged.record(tmp_path / "trace").__enter__(),
    ):
        with pytest.raises(errors.ConfigError, match="handle was closed"):
            use()
    with fluxmoe.page(paged.model, "1MiB") as again:  # the model is free for another handle
        assert same(answer(paged.model), answer(load()))
        assert again.stats()["misses"] > 0


def test_another_implementation_while_paged(paged: Any, load: Load) -> None:
    """Stock code would add experts on the meta device to zeros on the CPU, giving zeros."""
    for implementation in ("eager", "batched_mm"):
        paged.model.set_experts_implementation(implementation)
        with (
            pytest.raises(
                errors.UnsupportedError, match="choose the experts implementation before"
            ),
            torch.no_grad(),
        ):
            paged.model(**prompts())
    paged.model.set_experts_implementation("fluxmoe")
    assert same(answer(paged.model), answer(load()))


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_functions_registered_by_others_are_refused(load: Load, name: str) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def mine(*_: Any) -> torch.Tensor:
        raise AssertionError

    model = load(implementation=name)
    with fluxmoe.page(model, "1GiB"):
        ALL_EXPERTS_FUNCTIONS[name] = mine
        try:
            with pytest.raises(errors.UnsupportedError, match=f"registered as {name}"):
                answer(model)
        finally:
            del ALL_EXPERTS_FUNCTIONS[name]
        assert same(answer(model), answer(load(implementation=name)))
    ALL_EXPERTS_FUNCTIONS[name] = mine
    try:
        with pytest.raises(errors.UnsupportedError, match=f"registered as {name}"):
            fluxmoe.page(model, "1GiB")
    finally:
        del ALL_EXPERTS_FUNCTIONS[name]


@pytest.mark.parametrize("update", [False, True])
def test_a_replaced_forward_method_of_the_class_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, update: bool
) -> None:
    model = load(implementation="eager")
    experts = type(model.model.layers[1].mlp.experts)
    mine: Any = lambda self, hidden, *_: hidden  # noqa: E731
    monkeypatch.setattr(
        experts, "forward", functools.wraps(experts.forward)(mine) if update else mine
    )
    with pytest.raises(errors.UnsupportedError, match="forward was replaced"):
        fluxmoe.page(model, "1GiB")


def test_an_edit_of_the_array_that_a_weight_was_made_from_is_found(load: Load) -> None:
    model = load(implementation="eager").float()
    layer = model.model.layers[1].mlp.experts
    array = layer.down_proj.detach().numpy().copy()
    layer.down_proj = torch.nn.Parameter(torch.from_numpy(array))
    with fluxmoe.page(model, "1GiB") as paged:
        answer(model)
        paged.check()
        array *= 3
        with pytest.raises(errors.UnsupportedError, match="were changed while the model was paged"):
            paged.check()
