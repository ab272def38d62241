"""After weights change in a running engine, its answers are stock's with the new weights.

Checkpoints A and B have the same architecture. The weights change through vLLM's own calls:
``reload_weights``, ``load_weights`` of the model, ``collective_rpc`` and ``apply_model``. Each call
either gives the right answers or is refused with an error that names the call.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.errors import CheckpointError, FluxMoEError, UnsupportedError, WeightsError
from fluxmoe.inventory import expert_tensor
from fluxmoe.testing import checkpoints
from tests.identity.cells import MAMBA2
from tests.vllm.conftest import EAGER, KV_BYTES, PAGES, config, prompts

pytestmark = pytest.mark.vllm

#: Two prompts share a prefix of two KV blocks.
SHARED = list(range(5, 75))
BATCH = [
    *prompts(6, seed=3),
    Prompt(SHARED, 6, logprobs=True),
    Prompt([*SHARED[:64], 9], 6, logprobs=True),
]

Answers = tuple[list[list[int]], list[list[float]]]


def answers(engine: ChildEngine, *, cold: bool = False) -> Answers:
    run = engine.generate(BATCH, cold=cold)
    return run.tokens, run.logprobs


@dataclass(frozen=True)
class Versions:
    """Checkpoints, and stock's answers with each."""

    a: Path
    b: Path
    of_a: Answers
    of_b: Answers


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint B."""
    return checkpoints.write(tmp_path_factory.mktemp("b") / "model", "qwen3-moe", seed=7)


@pytest.fixture(scope="module")
def versions(eager: ChildEngine, checkpoint: Path, other: Path) -> Iterator[Versions]:
    found = []
    for model in (checkpoint, other):
        eager.restart(model=model, kv_cache_memory_bytes=KV_BYTES, **EAGER)
        found.append(answers(eager))
    assert found[0] != found[1]
    yield Versions(checkpoint, other, *found)
    eager.restart(model=checkpoint, kv_cache_memory_bytes=KV_BYTES, **EAGER)


def started(engine: ChildEngine, model: Path, slots: int = 20, **settings: Any) -> ChildEngine:
    engine.restart(model=model, fluxmoe=config(slots, **settings), **EAGER)
    return engine


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """``info`` of the engine that ``paged`` started last."""
    return {}


@pytest.fixture
def paged(eager: ChildEngine, versions: Versions, kept: dict[str, Any]) -> Iterator[ChildEngine]:
    """A paged engine with the weights A, started only if another test has replaced it."""
    if kept.get("info") is not eager.info:
        started(eager, versions.a, prefetch="next-layer")
        kept["info"] = eager.info
    assert answers(eager, cold=True) == versions.of_a
    yield eager
    eager.call("rpc", "reload_weights")


# --- ways to change the weights, called in the worker ---------------------------------------------


def through_model(worker: Any, path: str) -> None:
    worker.apply_model(
        lambda model: model.load_weights(load_file(f"{path}/model.safetensors").items())
    )


def through_iterator(worker: Any, path: str) -> None:
    worker.reload_weights(weights_iterator=iter(load_file(f"{path}/model.safetensors").items()))


def keeps_old(worker: Any) -> list[str]:
    return worker._door._unfollowing


def through_path(worker: Any, path: str) -> None:
    worker.reload_weights(weights_path=path)


def through_fused_names(worker: Any, path: str) -> None:
    """Load weights under the names of a transformers model, as a trainer would."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):  # vLLM wraps some of transformers' classes
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    worker.model_runner.model.load_weights(model.named_parameters())


DOORS = (through_path, through_iterator, through_model, through_fused_names)


@pytest.mark.parametrize("door", DOORS)
def test_answers_after_an_update_are_stocks_with_the_new_weights(
    paged: ChildEngine, versions: Versions, door: Callable[..., None]
) -> None:
    """Some pages are resident and others absent; the prefix cache has a prefix of both prompts."""
    updated_and_back(paged, versions, door)


def updated_and_back(engine: ChildEngine, versions: Versions, door: Callable[..., None]) -> None:
    before = engine.call("stats")["weight_updates"]
    engine.call("rpc", door, str(versions.b))
    run = engine.generate(BATCH, cold=False)
    assert (run.tokens, run.logprobs) == versions.of_b
    assert run.stats["weight_updates"] == before + 1
    engine.call("rpc", "fluxmoe_check")
    # After a return to the old weights, the prefix cache works as before.
    engine.call("rpc", "reload_weights")
    assert answers(engine) == versions.of_a
    again = engine.generate(BATCH, cold=False)
    assert sum(again.cached) > 64


def test_the_prefix_cache_of_the_old_weights_would_give_other_answers(
    paged: ChildEngine, versions: Versions
) -> None:
    """Negative control: the same update, but the scheduler is not notified."""
    paged.call("rpc", through_path, str(versions.b))
    paged.call("rpc", without_notice)
    run = paged.generate(BATCH, cold=False)
    assert sum(run.cached) > 64
    assert run.logprobs != versions.of_b[1]


def without_notice(worker: Any) -> None:
    worker._door.board.updates -= 1


# --- edits in place -------------------------------------------------------------------------------


def experts_of(model: Any) -> Iterator[tuple[Any, str, Any]]:
    for module in model.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            if weight.ndim == 3:
                yield module, name, weight


def zeroed(model: Any) -> None:
    for _, _, weight in experts_of(model):
        weight.data.zero_()


def copied(model: Any) -> None:
    for _, _, weight in experts_of(model):
        weight.data.copy_(torch.ones(weight.shape))


def scaled(model: Any) -> None:
    with torch.inference_mode():
        for _, _, weight in experts_of(model):
            weight.mul_(2)


def one_element(model: Any) -> None:
    with torch.no_grad():
        for _, _, weight in experts_of(model):
            weight[0, 0, 0] = 1


def other_memory(model: Any) -> None:
    for _, _, weight in experts_of(model):
        weight.data = torch.zeros(weight.shape, dtype=weight.dtype)


def replaced(model: Any) -> None:
    for module, name, weight in experts_of(model):
        zeros = torch.zeros(weight.shape, dtype=weight.dtype)
        setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))


def removed(model: Any) -> None:
    for module, name, _ in experts_of(model):
        delattr(module, name)


def through_an_array(model: Any) -> None:
    for _, _, weight in experts_of(model):
        weight.view(torch.uint8).numpy()[:] = 0


def from_a_state(model: Any) -> None:
    model.load_state_dict({**model.state_dict()})


EDITS = (zeroed, copied, scaled, one_element, other_memory, replaced, removed, through_an_array,
         from_a_state)  # fmt: skip


def shapes(model: Any) -> dict[str, list[int]]:
    return {name: [*weight.shape] for name, weight in model.named_parameters()}


def all_zeroed(model: Any) -> None:
    for weight in model.parameters():
        weight.data.zero_()


def test_edits_of_experts_are_refused_and_the_old_ones_remain(
    paged: ChildEngine, versions: Versions
) -> None:
    assert [16, 128, 64] in paged.call("rpc", "apply_model", shapes).values()
    for after_a_failed_update in (False, True):
        for edit in EDITS:
            with pytest.raises(UnsupportedError, match="experts' weights cannot be") as caught:
                paged.call("rpc", "apply_model", edit)
            assert "reload_weights" in caught.value.fix
            assert answers(paged) == versions.of_a, edit
        if not after_a_failed_update:
            with pytest.raises(WeightsError, match="the trainer has gone"):
                paged.call("rpc", wrong, breaking, str(versions.b))
    # As in stock vLLM, other weights may be edited; here, the edits precede the refusal.
    with pytest.raises(UnsupportedError, match="experts' weights cannot be"):
        paged.call("rpc", "apply_model", all_zeroed)
    assert answers(paged, cold=True) != versions.of_a
    paged.call("rpc", "reload_weights")
    assert answers(paged) == versions.of_a


# --- refused before anything is loaded ------------------------------------------------------------


def test_a_checkpoint_that_does_not_fit_is_refused(
    paged: ChildEngine, versions: Versions, tmp_path: Path
) -> None:
    small = checkpoints.write(tmp_path / "small", "qwen3-moe", num_experts=8)
    b = whole(versions)
    lacking = mixed(versions.b, tmp_path / "lacking", {})
    del b["lm_head.weight"]
    save_file(b, lacking / "model.safetensors", {"format": "pt"})
    for path, error, message in (
        (tmp_path / "none", CheckpointError, "no such folder"),
        (small, WeightsError, "has the shape"),
        (lacking, WeightsError, r"weights are missing \(1\), such as lm_head.weight"),
    ):
        with pytest.raises(error, match=message):
            paged.call("rpc", through_path, str(path))
        assert answers(paged) == versions.of_a


def test_no_update_while_requests_are_unfinished(paged: ChildEngine, versions: Versions) -> None:
    with pytest.raises(WeightsError, match="8 requests are unfinished") as caught:
        paged.call("rpc_between", BATCH, through_path, str(versions.b))
    assert "finish or abort" in caught.value.fix
    assert answers(paged, cold=True) == versions.of_a
    paged.call("rpc", through_path, str(versions.b))
    assert answers(paged) == versions.of_b


# --- parts of the weights -------------------------------------------------------------------------


def weights(worker: Any, given: list[tuple[str, Any]]) -> None:
    worker.model_runner.model.load_weights(given)


def expert(checkpoint: Path, layer: int, number: int) -> dict[str, torch.Tensor]:
    name = f"model.layers.{layer}.mlp.experts.{number}."
    return {key: value for key, value in load_file(checkpoint / "model.safetensors").items()
            if key.startswith(name)}  # fmt: skip


def mixed(a: Path, folder: Path, changes: dict[str, torch.Tensor]) -> Path:
    """Copy a checkpoint with changed weights."""
    folder.mkdir()
    for file in a.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file({**load_file(a / "model.safetensors"), **changes}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    return folder


def test_also_if_all_pages_are_resident(eager: ChildEngine, versions: Versions) -> None:
    started(eager, versions.a, PAGES)
    assert answers(eager) == versions.of_a
    updated_and_back(eager, versions, through_path)


def test_single_experts_are_replaced(
    eager: ChildEngine, versions: Versions, tmp_path: Path
) -> None:
    changes = {}
    for layer, number in ((0, 3), (0, 4), (2, 15)):
        changes |= expert(versions.b, layer, number)
    model = mixed(versions.a, tmp_path / "mixed", changes)
    eager.restart(model=model, kv_cache_memory_bytes=KV_BYTES, **EAGER)
    expected = answers(eager)
    assert expected not in (versions.of_a, versions.of_b)
    started(eager, versions.a, stores=[{"kind": "host", "codec": "fixed4"}])
    assert answers(eager) == versions.of_a
    eager.call("rpc", weights, [*changes.items()])
    assert answers(eager) == expected


# --- refused, with the old weights ----------------------------------------------------------------


def whole(versions: Versions) -> dict[str, torch.Tensor]:
    return load_file(versions.b / "model.safetensors")


UP = "model.layers.3.mlp.experts.7.up_proj.weight"
FUSED = "model.layers.3.mlp.experts.gate_up_proj"
QUERY = "model.layers.3.self_attn.q_proj.weight"


def missing_part(b: dict[str, Any]) -> object:
    return {name: b[name] for name in b if name != UP}


def one_projection(b: dict[str, Any]) -> object:
    return {UP: b[UP]}


def too_short(b: dict[str, Any]) -> object:
    return {**b, UP: b[UP][:-1]}


def too_long(b: dict[str, Any]) -> object:
    return {**b, QUERY: torch.cat([b[QUERY], b[QUERY]])}


def wrong_dimensions(b: dict[str, Any]) -> object:
    return {**b, UP: b[UP][None]}


def missing_other(b: dict[str, Any]) -> object:
    return {name: b[name] for name in b if name != QUERY}


def wrong_name(b: dict[str, Any]) -> object:
    return {**b, "model.layers.3.self_attn.q_porj.weight": b[QUERY]}


def wrong_expert(b: dict[str, Any]) -> object:
    return {**b, UP.replace("experts.7", "experts.16"): b[UP]}


def wrong_projection(b: dict[str, Any]) -> object:
    return {**b, UP.replace("up_proj", "w9"): b[UP]}


def wrong_layer(b: dict[str, Any]) -> object:
    return {**b, UP.replace("layers.3", "layers.4"): b[UP]}


def twice(b: dict[str, Any]) -> object:
    return [*b.items(), (UP, b[UP])]


def fewer_experts(b: dict[str, Any]) -> object:
    return {FUSED: torch.zeros(15, 128, 128)}


def more_experts(b: dict[str, Any]) -> object:
    return {FUSED: torch.zeros(17, 128, 128)}


def no_pairs(b: dict[str, Any]) -> object:
    return [*b]


def no_tensor(b: dict[str, Any]) -> object:
    return {**b, UP: [1, 2]}


def no_list(b: dict[str, Any]) -> object:
    return 5


def elsewhere(b: dict[str, Any]) -> object:
    return {**b, UP: b[UP].to("meta")}


def breaking(b: dict[str, Any]) -> object:
    def some() -> Iterator[Any]:
        yield from [*b.items()][:-1]
        raise OSError("the trainer has gone")

    return some()


WRONG: dict[Callable[[dict[str, Any]], object], str] = {
    missing_part: "expert 7 of model.layers.3.mlp.experts.* has no up projection",
    one_projection: "has no gate projection, down projection",
    too_short: r"up_proj.weight has the shape \[63, 128\], not \[64, 128\]",
    too_long: r"q_proj.weight has the shape \[256, 128\], not \[128, 128\]",
    wrong_dimensions: r"has the shape \[1, 64, 128\]",
    missing_other: r"weights are missing \(1\), such as model.layers.3.self_attn.q_proj.weight",
    wrong_name: "this model has no weight .*q_porj.weight.*did you mean.*q_proj",
    wrong_expert: "this model has no weight .*experts.16.up_proj.weight",
    wrong_projection: "this model has no weight .*experts.7.w9.weight",
    wrong_layer: "layers.4",
    twice: "up_proj.weight was given twice",
    fewer_experts: r"gate_up_proj has the shape \[15, 128, 128\], not \[16, ",
    more_experts: r"gate_up_proj has the shape \[17, ",
    no_pairs: "an item is of type str, not a pair",
    no_tensor: "up_proj.weight is of type list, not a tensor",
    no_list: "weights are of type int",
    elsewhere: "up_proj.weight is on meta",
    breaking: "the trainer has gone",
}


def wrong(worker: Any, make: Callable[[dict[str, Any]], object], path: str) -> None:
    worker.model_runner.model.load_weights(make(load_file(f"{path}/model.safetensors")))


def test_wrong_weights_are_refused_and_the_old_ones_remain(
    eager: ChildEngine, versions: Versions, tmp_path: Path
) -> None:
    file = {"kind": "file", "path": str(tmp_path)}
    started(eager, versions.a, stores=[file], prefetch="next-layer")
    for make, message in WRONG.items():
        with pytest.raises(WeightsError) as caught:
            eager.call("rpc", wrong, make, str(versions.b))
        assert re.search(message, caught.value.text), make
        assert caught.value.fix
        assert "\n" not in str(caught.value)
        assert answers(eager) == versions.of_a, make
    eager.call("rpc", through_path, str(versions.b))  # nothing was left behind
    assert answers(eager) == versions.of_b


def nested(worker: Any, path: str) -> None:
    load, weights = worker.model_runner.model.load_weights, load_file(f"{path}/model.safetensors")

    def given() -> Iterator[tuple[str, torch.Tensor]]:
        first, *others = weights.items()
        yield first
        load(weights.items())
        yield from others

    load(given())


def test_an_update_within_an_update_is_refused(eager: ChildEngine, versions: Versions) -> None:
    started(eager, versions.a)
    with pytest.raises(WeightsError, match="an update of the weights is in progress"):
        eager.call("rpc", nested, str(versions.b))
    assert answers(eager) == versions.of_a
    eager.call("rpc", through_path, str(versions.b))
    assert answers(eager) == versions.of_b


def test_a_full_store_refuses(eager: ChildEngine, versions: Versions, tmp_path: Path) -> None:
    """Noise cannot be coded, so the new pages do not fit."""
    stores = [{"kind": "host", "codec": "fixed4", "limit": f"{int(0.85 * PAGES * 49152)}B"}]
    started(eager, versions.a, stores=stores)
    noise = {name: torch.randint(-(2**15), 2**15, value.shape, dtype=torch.int16)
             .view(torch.bfloat16) for name, value in whole(versions).items()
             if ".experts." in name}  # fmt: skip
    with pytest.raises(FluxMoEError, match="no store has room"):
        eager.call("rpc", weights, [*noise.items()])
    assert answers(eager) == versions.of_a


def test_a_compiled_model_changes_its_experts_only(
    eager: ChildEngine, versions: Versions, tmp_path: Path
) -> None:
    options = {key: value for key, value in EAGER.items() if key != "enforce_eager"}
    changes = {name: value for name, value in whole(versions).items() if ".experts." in name}
    model = mixed(versions.a, tmp_path / "mixed", changes)
    eager.restart(model=model, kv_cache_memory_bytes=KV_BYTES, **options)
    expected = answers(eager)
    eager.restart(model=versions.a, fluxmoe=config(20), **options)
    before = answers(eager)
    with pytest.raises(UnsupportedError, match="compiled model cannot change weights other than"):
        eager.call("rpc", through_path, str(versions.b))
    assert answers(eager) == before
    with pytest.raises(UnsupportedError, match="experts' weights cannot be used"):
        eager.call("rpc", "apply_model", zeroed)
    assert answers(eager, cold=True) == before
    eager.call("rpc", weights, [*changes.items()])
    assert answers(eager) == expected != before


# --- stores, and other engines --------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("codec", [pytest.param("none", marks=pytest.mark.full), "fixed4"])
def test_page_files_keep_the_checkpoints_weights(
    eager: ChildEngine, versions: Versions, tmp_path: Path, codec: str
) -> None:
    """A second engine uses the files while the first has other weights; so does a restarted one."""
    stores = [
        {"kind": "host", "codec": codec, "limit": 20 * 49152},
        {"kind": "file", "path": str(tmp_path), "codec": codec},
    ]
    started(eager, versions.a, stores=stores)
    assert answers(eager) == versions.of_a
    before = digests(tmp_path)
    assert len(before) == 1
    with ChildEngine(versions.a, fluxmoe=config(20, stores=stores), **EAGER) as other:
        for path in (versions.b, versions.a, versions.b):
            eager.call("rpc", through_path, str(path))
            assert answers(eager) == (versions.of_b if path == versions.b else versions.of_a)
            assert answers(other, cold=True) == versions.of_a
        assert digests(tmp_path) == before
    started(eager, versions.a, stores=stores)
    assert answers(eager) == versions.of_a
    assert digests(tmp_path) == before


def killed(worker: Any, path: str) -> None:
    """Update, then die during the next update, when most of its weights are staged."""
    worker.reload_weights(weights_path=path)

    def some() -> Iterator[Any]:
        given = [*load_file(f"{path}/model.safetensors").items()]
        yield from given[: -len(given) // 8]
        os.kill(os.getpid(), signal.SIGKILL)

    worker.reload_weights(some())


def test_an_engine_killed_within_an_update_leaves_a_whole_page_file(
    eager: ChildEngine, versions: Versions, tmp_path: Path
) -> None:
    stores = [{"kind": "file", "path": str(tmp_path)}]
    with ChildEngine(versions.a, fluxmoe=config(20, stores=stores), **EAGER) as engine:
        assert answers(engine) == versions.of_a
        before = digests(tmp_path)
        with pytest.raises(FluxMoEError, match="ended unexpectedly"):
            engine.call("rpc", killed, str(versions.b))
    assert digests(tmp_path) == before
    started(eager, versions.a, stores=stores)
    assert answers(eager) == versions.of_a
    assert digests(tmp_path) == before


@pytest.mark.full
def test_in_three_processes(versions: Versions) -> None:
    settings = config(20, arbitration="marginal")
    with ChildEngine(versions.a, three_processes=True, fluxmoe=settings, **EAGER) as engine:
        with pytest.raises(FluxMoEError, match=r"FM406.*no such folder"):
            engine.call("rpc", "reload_weights", None, str(versions.b / "none"))
        with pytest.raises(FluxMoEError, match=r"FM402.*update_weights is not supported"):
            engine.call("rpc", "update_weights", {})
        assert answers(engine) == versions.of_a
        engine.call("rpc", "reload_weights", None, str(versions.b))
        assert answers(engine) == versions.of_b
        engine.call("rpc", "reload_weights")
        assert answers(engine) == versions.of_a


def broken_on(model: Any, rank: int, path: str) -> None:
    """Load weights; on one worker, the iterator raises an error before the last tensor."""
    from fluxmoe.backends.vllm.compat.worker import get_tensor_model_parallel_rank

    given = load_file(f"{path}/model.safetensors")
    model.load_weights(breaking(given) if get_tensor_model_parallel_rank() == rank else given)


FEW = prompts(2, tokens=4, seed=3)


@pytest.mark.full
@pytest.mark.slow
def test_workers_change_together(
    checkpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one worker refuses, all refuse, and no worker's answer is left for the next call."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions are sent to workers
    options = {**EAGER, "tensor_parallel_size": 2, "three_processes": True, "fluxmoe": config(40)}

    def few(engine: ChildEngine) -> Answers:
        run = engine.generate(FEW, cold=False)
        return run.tokens, run.logprobs

    with ChildEngine(other, **options) as engine:
        expected = few(engine)
    with ChildEngine(checkpoint, **options) as engine:
        before = few(engine)
        for rank in (0, 1):
            broken = partial(broken_on, rank=rank, path=str(other))
            with pytest.raises(FluxMoEError, match=r"FM408.*the trainer has gone"):
                engine.call("rpc", "apply_model", broken)
            assert few(engine) == before
        for call, *args in (("apply_model", zeroed), ("update_weights", {})):
            with pytest.raises(FluxMoEError, match="FM402"):
                engine.call("rpc", call, *args)
            assert few(engine) == before
        engine.call("rpc", "reload_weights", None, str(other))
        assert few(engine) == expected != before
        assert {each["weight_updates"] for each in engine.call("everyone")} == {1}


GREEDY = [Prompt(prompt.tokens, 8, logprobs=True) for prompt in BATCH]


def greedy(engine: ChildEngine) -> list[list[float]]:
    return engine.generate(GREEDY, cold=False).logprobs


@pytest.mark.parametrize(
    "architecture",
    [
        "lfm2-moe",
        "granite-hybrid",
        *(pytest.param(name, marks=pytest.mark.full)
          for name in ("mixtral", "qwen3-next", "deepseek-v2")),
    ],
)  # fmt: skip
def test_other_architectures(
    eager: ChildEngine, versions: Versions, tmp_path: Path, architecture: str
) -> None:
    """Weights change in models with tied embeddings, states, MLA, and shared or fused experts.

    On CPUs for which vLLM packs weights, vLLM keeps the old weights of Mamba-2's convolution, so
    only the experts can change.
    """
    a = checkpoints.write(tmp_path / "a", architecture)
    b = checkpoints.write(tmp_path / "b", architecture, seed=7)
    kept = architecture == "granite-hybrid"
    if kept:
        experts = {
            name: weight
            for name, weight in load_file(b / "model.safetensors").items()
            if expert_tensor(name, weight.ndim)
        }
        b = mixed(a, tmp_path / "mixed", experts)
    options = {**EAGER, "block_size": 16 if architecture == "deepseek-v2" else 32}
    options["enable_prefix_caching"] = architecture not in MAMBA2
    found = []
    for model in (a, b):
        eager.restart(model=model, kv_cache_memory_bytes=4 * KV_BYTES, **options)
        found.append(greedy(eager))
    assert found[0] != found[1]
    eager.restart(model=a, fluxmoe={"memory": {"budget": "64MiB"}}, **options)
    assert greedy(eager) == found[0]
    if eager.call("rpc", keeps_old):
        with pytest.raises(
            UnsupportedError, match=r"vLLM keeps model\.layers\.0\.mamba\.conv_weights"
        ):
            eager.call("rpc", through_path, str(b))
        assert greedy(eager) == found[0]
        eager.call("rpc", weights, [*experts.items()])
    else:
        eager.call("rpc", through_path, str(b))
    assert greedy(eager) == found[1]
