"""New weights given to the handle are used in outputs and in the model after ``close``."""

from __future__ import annotations

import copy
import hashlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fluxmoe
from fluxmoe.backends.torch import experts
from fluxmoe.backends.torch.weights.update import NewWeights
from fluxmoe.demo.model import SHIPPED
from fluxmoe.errors import FluxMoEError, UnsupportedError, WeightsError
from tests.torch.conftest import Load, prompts

STORES = {
    "host": [{"kind": "host"}],
    "coded": [{"kind": "host", "codec": "fixed4"}],
    "file": [{"kind": "file"}],
}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
HEAD = "lm_head.weight"


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompts(), use_cache=False).logits


@pytest.fixture(scope="module")
def pair(load: Load) -> tuple[Any, Any]:
    a, b = load(), load()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in b.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=draw).to(weight.dtype)
    assert not torch.equal(run(a), run(b))
    return a, b


def stores(kind: str, folder: Path) -> list[dict[str, Any]]:
    return [{**s, "path": str(folder)} if kind == "file" else s for s in STORES[kind]]


@pytest.fixture(params=list(STORES))
def kept(request: Any, tmp_path: Path) -> list[dict[str, Any]]:
    return stores(request.param, tmp_path)


@pytest.mark.parametrize("memory", ["1MiB", "64MiB"])
def test_outputs_and_the_model_after_closing_are_those_of_the_new_weights(
    pair: tuple[Any, Any], kept: list[dict[str, Any]], memory: str, tmp_path: Path
) -> None:
    a, b = pair
    model = copy.deepcopy(a)
    with fluxmoe.page(model, memory, stores=kept, prefetch="next-layer") as paged:
        assert torch.equal(run(model), run(a))
        files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in tmp_path.iterdir()}
        paged.update_weights(b.state_dict())
        assert torch.equal(run(model), run(b))
        paged.check()
        paged.update_weights(iter(a.state_dict().items()))
        assert torch.equal(run(model), run(a))
        paged.update_weights([(GATE_UP, b.state_dict()[GATE_UP]), (DOWN, b.state_dict()[DOWN])])
        mixed = copy.deepcopy(a)
        mixed.model.layers[1].mlp.experts.load_state_dict(
            b.model.layers[1].mlp.experts.state_dict()
        )
        assert torch.equal(run(model), run(mixed))
        paged.update_weights(b.named_parameters())
    assert torch.equal(run(model), run(b))
    own, new = model.state_dict(), b.state_dict()
    assert own.keys() == new.keys()
    assert all(torch.equal(own[name], new[name]) for name in new)
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert len(files) == (kept[0]["kind"] == "file")


def test_a_loaded_model(
    pair: tuple[Any, Any], checkpoint: Callable[..., Path], kept: list[dict[str, Any]]
) -> None:
    a, b = pair
    with fluxmoe.load(checkpoint(), "1MiB", stores=kept) as paged:
        assert torch.equal(run(paged.model), run(a))
        paged.update_weights(b.state_dict())
        assert torch.equal(run(paged.model), run(b))
    with fluxmoe.load(checkpoint(), "1MiB", stores=kept) as paged:
        assert torch.equal(run(paged.model), run(a))


def broken(b: dict[str, torch.Tensor]) -> Any:
    yield from b.items()
    raise OSError("the trainer has gone")


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "missing part": (
        lambda b: {name: b[name] for name in b if name != DOWN},
        WeightsError,
        "experts of MoE layer 1 have no down_proj",
    ),
    "shape": (lambda b: {**b, HEAD: b[HEAD][1:]}, WeightsError, r"has the shape \[1023, 128\]"),
    "experts": (lambda b: {**b, DOWN: b[DOWN][1:]}, WeightsError, r"has the shape \[15, "),
    "name": (
        lambda b: {**b, "lm_haed.weight": b[HEAD]},
        WeightsError,
        r"this model has no weight lm_haed.weight; did you mean 'lm_head.weight'",
    ),
    "twice": (lambda b: [*b.items(), (HEAD, b[HEAD])], WeightsError, "was given twice"),
    "names": (lambda b: [*b], WeightsError, "an item is of type str, not a pair"),
    "no tensor": (lambda b: {**b, HEAD: 1}, WeightsError, "lm_head.weight is of type int, not a"),
    "no list": (lambda b: None, WeightsError, "weights are of type NoneType"),
    "meta": (lambda b: {**b, HEAD: b[HEAD].to("meta")}, WeightsError, "is on meta"),
    "iteration": (broken, OSError, "the trainer has gone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_weights_change_nothing(pair: tuple[Any, Any], case: str, tmp_path: Path) -> None:
    a, b = pair
    make, error, message = WRONG[case]
    model = copy.deepcopy(a)
    with fluxmoe.page(model, "1MiB", stores=stores("file", tmp_path)) as paged:
        with pytest.raises(error, match=message) as caught:
            paged.update_weights(make(b.state_dict()))
        assert "\n" not in str(caught.value)
        if isinstance(caught.value, FluxMoEError):
            assert caught.value.fix
        assert torch.equal(run(model), run(a))
    assert all(map(torch.equal, model.state_dict().values(), a.state_dict().values()))


def test_a_hook_may_update_and_a_closed_handle_may_not(pair: tuple[Any, Any]) -> None:
    a, b = pair
    model = copy.deepcopy(a)
    with fluxmoe.page(model, "1MiB") as paged:

        def update(*_: object) -> None:
            paged.update_weights(b.state_dict())

        hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(update)
        run(model)  # old weights before the update, new weights after it
        hook.remove()
        assert torch.equal(run(model), run(b))
        paged.close()
        with pytest.raises(FluxMoEError, match="no longer paged"):
            paged.update_weights(b.state_dict())


def test_threads_see_whole_updates(pair: tuple[Any, Any]) -> None:
    """Every pass has either the old weights or the new ones."""
    a, b = pair
    model, found = copy.deepcopy(a), []
    with fluxmoe.page(model, "1MiB", copy_threads=2) as paged:
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                found.append(run(model))

        thread = threading.Thread(target=work)
        thread.start()
        for each in (b, a, b, a):
            paged.update_weights(each.state_dict())
        done.set()
        thread.join()
    right = run(a), run(b)
    assert found
    assert all(any(torch.equal(each, one) for one in right) for each in found)


def test_an_iterator_may_reuse_its_tensors_and_weights_may_be_the_models_own(pair) -> None:
    a, b = pair
    model, buffers = copy.deepcopy(a), {}

    def reusing() -> Any:
        for name, weight in b.state_dict().items():
            buffer = buffers.setdefault(weight.shape, torch.empty_like(weight))
            yield name, buffer.copy_(weight)

    with fluxmoe.page(model, "1MiB") as paged:
        paged.update_weights(reusing())
        assert torch.equal(run(model), run(b))
    assert torch.equal(run(model), run(b))
    own, norms = copy.deepcopy(a), [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]
    swapped, given = copy.deepcopy(a), dict(own.named_parameters())
    moe = [name.replace(".1.", f".{i}.") for i in (0, 1) for name in (GATE_UP, DOWN)]
    names = [*norms, *moe]
    others = [*norms[::-1], *moe[2:], *moe[:2]]
    other = dict(zip(names, others, strict=True))
    swapped.load_state_dict({**a.state_dict(), **{name: given[other[name]] for name in names}})
    state = own.state_dict()
    with fluxmoe.page(own, "1MiB") as paged:
        paged.update_weights({name: state[other[name]] for name in names})
        assert torch.equal(run(own), run(swapped))
    assert torch.equal(run(own), run(swapped)) and not torch.equal(run(own), run(a))


@pytest.mark.parametrize(
    "odd",
    [
        lambda weight: weight.to_sparse(),
        lambda weight: torch.quantize_per_tensor(weight.float(), 0.1, 0, torch.qint8),
        lambda weight: weight.float().to(torch.complex64),
    ],
    ids=["sparse", "quantised", "complex"],
)
def test_tensors_of_other_kinds_change_nothing(pair, odd) -> None:
    a, b = pair
    model = copy.deepcopy(a)
    with fluxmoe.page(model, "1MiB") as paged:
        for name in (GATE_UP, HEAD):
            weights = {**b.state_dict(), name: odd(b.state_dict()[name])}
            with pytest.raises(WeightsError, match="give dense real numbers"):
                paged.update_weights(weights)
            assert torch.equal(run(model), run(a))


@pytest.mark.parametrize("at", [(NewWeights, "take_over"), (experts, "resize")])
def test_an_interrupt_waits_for_changes_that_belong_together(pair, monkeypatch, at) -> None:
    a, b = pair
    model, change, inner = copy.deepcopy(a), at[1], getattr(*at)

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        inner(*args)

    # A process started in the background may ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with fluxmoe.page(model, "1MiB") as paged:
        monkeypatch.setattr(*at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            paged.resize("3MiB") if change == "resize" else paged.update_weights(b.state_dict())
        signal.signal(signal.SIGINT, before)
        monkeypatch.undo()
        paged.check()
        assert torch.equal(run(model), run(a if change == "resize" else b))
    assert torch.equal(run(model), run(a if change == "resize" else b))


def test_layers_that_share_experts_are_refused(pair) -> None:
    model = copy.deepcopy(pair[0])
    first, second = (model.model.layers[i].mlp.experts for i in (0, 1))
    second.down_proj = first.down_proj
    before = run(model)
    with pytest.raises(UnsupportedError, match="share experts"):
        fluxmoe.page(model, "1MiB")
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_slots_are_not_limited_by_the_type_of_expert_ids(dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, experts_implementation="grouped_mm")
    x = torch.randn(90, model.config.hidden_size).to(model.dtype)
    ids = torch.stack([torch.randperm(64)[:4] for _ in range(90)]).to(dtype)
    weights = torch.rand(90, 4).to(model.dtype)
    moe = [layer.mlp.experts for layer in model.model.layers]
    with torch.no_grad():
        right = [each(x, ids, weights) for each in moe]
        with fluxmoe.page(model, "64MiB") as paged:
            assert paged.stats()["slots"] > 256
            for each, expected in zip(moe, right, strict=True):
                assert torch.equal(each(x, ids, weights), expected)


def test_load_state_dict_names_the_way(pair: tuple[Any, Any]) -> None:
    a, b = pair
    with (
        fluxmoe.page(copy.deepcopy(a), "1MiB") as paged,
        pytest.raises(UnsupportedError) as caught,
    ):
        paged.model.load_state_dict(b.state_dict())
    assert "update_weights()" in caught.value.fix


def test_a_tensor_with_two_names_takes_one_value(checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tie_word_embeddings=True)).eval()
    weight = model.lm_head.weight.detach()
    with fluxmoe.page(model, "1GiB") as paged:
        before = run(model)
        names = HEAD, "model.embed_tokens.weight"
        with pytest.raises(WeightsError, match="are the same tensor, but have different values"):
            paged.update_weights(dict(zip(names, (weight * 2, weight * 3), strict=True)))
        assert torch.equal(run(model), before)
        paged.update_weights(dict.fromkeys(names, weight * 2))
        assert not torch.equal(run(model), before)


def test_another_paged_model_with_the_same_memory_notices(pair: tuple[Any, Any]) -> None:
    a, b = (copy.deepcopy(each) for each in pair)
    other = copy.deepcopy(a)
    mine, theirs = (each.model.layers[1].mlp.experts for each in (a, other))
    theirs.down_proj = torch.nn.Parameter(mine.down_proj.detach())
    with fluxmoe.page(a, "1GiB") as paged, fluxmoe.page(other, "1GiB"):
        run(other)
        paged.update_weights(b.state_dict())
        assert torch.equal(run(a), run(b))
        with pytest.raises(UnsupportedError, match="were changed while the model was paged"):
            run(other)
        paged.update_weights(b.state_dict())
        assert torch.equal(run(a), run(b))
