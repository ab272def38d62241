"""Problems of a checkpoint are detected before the checkpoint is loaded (A3, A9)."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fluxmoe
from fluxmoe import config
from fluxmoe import dimensions as plan
from fluxmoe.backends.vllm.preflight import checks
from fluxmoe.checkpoint import downloaded, expert_tensors, require_readable, weight_bytes
from fluxmoe.errors import CheckpointError, FluxMoEError
from fluxmoe.findings import Findings
from fluxmoe.inventory import require_experts
from fluxmoe.testing import checkpoints

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("pristine") / "model", "qwen3-moe")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(model: Path | str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        require_readable(str(model))
    assert caught.value.code == "FM406"
    return caught.value


def overwrite(at: int, data: bytes) -> Damage:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: os.truncate(path, path.stat().st_size - 1), id="one byte short"),
        pytest.param(lambda path: os.truncate(path, 100), id="ends in its header"),
        pytest.param(lambda path: os.truncate(path, 0), id="empty"),
        pytest.param(lambda path: os.truncate(path, path.stat().st_size + 1), id="too long"),
        pytest.param(overwrite(0, b"\xff" * 8), id="length of the header"),
        pytest.param(overwrite(8, b"X"), id="header is no JSON"),
    ],
)
def test_damaged_weights(model: Path, damage: Damage) -> None:
    require_readable(str(model))
    damage(model / WEIGHTS)
    error = refused(model)
    assert "damaged or truncated" in error.what
    assert error.where == str(model / WEIGHTS)


def test_an_expert_that_is_missing(model: Path) -> None:
    """vLLM loads such a checkpoint and computes with uninitialised memory."""
    tensors = load_file(model / WEIGHTS)
    del tensors[EXPERT]
    save_file(tensors, model / WEIGHTS)
    assert refused(model).what == f"{EXPERT} is missing"
    for name in [name for name in tensors if ".experts.3." in name]:
        del tensors[name]  # a gap in the numbers of every layer
    save_file(tensors, model / WEIGHTS)
    assert "experts.3." in refused(model).what


def test_files_in_shards(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, model / file)
    (model / WEIGHTS).unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    require_readable(str(model))

    (model / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "more": "a.safetensors"}}))
    error = refused(model)
    assert "more is missing, but listed in" in error.what
    assert error.where == str(model / "a.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (model / "b.safetensors").unlink()
    error = refused(model)
    assert "the file is missing" in error.what
    assert error.where == str(model / "b.safetensors")
    (model / INDEX).write_text(json.dumps({}))
    assert "no weight_map" in refused(model).what
    (model / INDEX).unlink()
    assert "is missing" in refused(model).what  # only the number of experts reveals it


@pytest.mark.parametrize("indexed", [False, True])
def test_a3_other_files_of_weights_do_not_count(model: Path, indexed: bool) -> None:
    """Mistral's ``consolidated.safetensors``, a left-over shard, and a tensor in two shards."""
    before = read(model), weight_bytes(str(model)), sorted(survey(model))
    if indexed:
        tensors = load_file(model / WEIGHTS)
        names = sorted(tensors)
        shards = {"a.safetensors": names[: len(names) // 2 + 3], "b.safetensors": names[9:]}
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, model / file)
        (model / WEIGHTS).unlink()
        weight_map = {name: file for file, part in shards.items() for name in part}
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        shutil.copy(model / "a.safetensors", model / "consolidated.safetensors")
    else:
        shutil.copy(model / WEIGHTS, model / "consolidated.safetensors")
    require_readable(str(model))
    assert read(model) == before[0]
    assert sorted(survey(model)) == before[2]
    if not indexed:
        assert weight_bytes(str(model)) == before[1]


def survey(model: Path) -> Iterator[tuple[object, ...]]:
    for name, dtype, shape, data in expert_tensors(model):
        yield str(name), dtype, tuple(shape), data.tobytes()


def read(model: Path) -> object:
    return plan.of_checkpoint(model)


def test_a3_several_files_without_an_index(model: Path) -> None:
    (model / WEIGHTS).rename(model / "a.safetensors")
    require_readable(str(model))
    shutil.copy(model / "a.safetensors", model / "b.safetensors")
    error = refused(model)
    assert "there are 2 files of weights, but no model.safetensors.index.json" in error.what
    with pytest.raises(CheckpointError, match="2 files of weights"):
        weight_bytes(str(model))


#: Architecture → location, number and parts of its experts.
PLACES = {
    "qwen3-moe": ("mlp.experts", 16, ("down_proj", "gate_proj", "up_proj")),
    "mixtral": ("block_sparse_moe.experts", 8, ("w1", "w2", "w3")),
    "deepseek-v2": ("mlp.experts", 16, ("down_proj", "gate_proj", "up_proj")),
    "glm4-moe": ("mlp.experts", 16, ("down_proj", "gate_proj", "up_proj")),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("originals")
    return lambda name: checkpoints.write(folder / name, name)


def changed(model: Path, into: Path, change: Callable[[Tensors], object]) -> Path:
    """Copy a checkpoint with changed tensors."""
    shutil.copytree(model, into)
    tensors = {
        name: tensor
        for path in model.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    for path in into.glob("*.safetensors*"):
        path.unlink()
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, into / WEIGHTS)
    return into


def without(*patterns: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if any(re.search(pattern, n) for pattern in patterns)]:
            del tensors[name]

    return change


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
def test_whole_checkpoints(architecture: str, originals: Callable[[str], Path]) -> None:
    require_readable(str(originals(architecture)))


@pytest.mark.parametrize("architecture", PLACES)
def test_experts_that_config_json_promises(
    architecture: str, originals: Callable[[str], Path], tmp_path: Path
) -> None:
    """Layers are numbered from 0; two of these models have a dense first layer."""
    path, count, parts = PLACES[architecture]
    whole, layer = originals(architecture), rf"model\.layers\.2\.{path}"
    head = f"model.layers.2.{path}"
    last = count - 1
    cases = {
        "the last expert of a layer": (
            [rf"{layer}\.{last}\."],
            f"{head}.{last}.{parts[0]}.weight is",
        ),
        "half of a layer": (
            [rf"{layer}\.([{count // 2}-9]|1\d)\."],
            f"{head}.{count // 2}.{parts[0]}",
        ),
        "the last one of all": (
            [rf"{path}\.{last}\."],
            f".{path}.{last}.{parts[0]}.weight is missing",
        ),
        "a part of all experts": ([rf"{layer}\.\d+\.{parts[1]}"], f"{head}.0.{parts[1]}.weight is"),
        "all experts of a layer": ([rf"{layer}\."], f"{head} is missing: the layer has none"),
        "and its router": ([rf"layers\.2\.{path.split('.')[0]}\."], f"{head} is missing"),
        "a whole layer": ([r"model\.layers\.2\."], f"{head} is missing"),
        "all experts": ([rf"{path}\."], "all experts of model.layers."),
    }
    for index, (what, (patterns, said)) in enumerate(cases.items()):
        error = refused(changed(whole, tmp_path / str(index), without(*patterns)))
        assert said in error.what, what


def fused(tensors: Tensors) -> None:
    """Fuse the experts of each layer into two tensors."""
    names = [name for name in tensors if ".experts." in name]
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name in names:
        layer, expert, part = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name).groups()  # type: ignore[union-attr]
        layers.setdefault(layer, {})[f"{part} {int(expert):03}"] = tensors.pop(name)
    for layer, of in layers.items():
        stacked = {
            part: torch.stack([of[name] for name in sorted(of) if name.startswith(part)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{layer}.gate_up_proj"] = torch.cat([stacked["gate_proj"], stacked["up_proj"]], 1)
        tensors[f"{layer}.down_proj"] = stacked["down_proj"]


def cut(name: str, rows: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = torch.cat([tensors[name]] * 2)[:rows]

    return change


def test_experts_in_one_tensor(originals: Callable[[str], Path], tmp_path: Path) -> None:
    whole = changed(originals("qwen3-moe"), tmp_path / "fused", fused)
    require_readable(str(whole))
    nested = json.loads((whole / "config.json").read_text())
    nested = {"model_type": "x", "text_config": nested}
    head = "model.layers.3.mlp.experts"
    for number, (change, said) in enumerate(
        (
            (cut(f"{head}.down_proj", 15), f"{head}.down_proj has 15 experts, but config.json"),
            (cut(f"{head}.gate_up_proj", 17), f"{head}.gate_up_proj has 17 experts, but"),
            (without(rf"{head}\.down_proj"), f"{head}.down_proj is missing"),
            (without(rf"{head}\."), f"{head} is missing: the layer has none"),
        )
    ):
        broken = changed(whole, tmp_path / str(number), change)
        assert said in refused(broken).what
        (broken / "config.json").write_text(json.dumps(nested))
        assert said in refused(broken).what
    # With Granite's names.
    granite = tmp_path / "granite"

    def renamed(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            to = name.replace("mlp.experts.gate_up_proj", "block_sparse_moe.input_linear.weight")
            to = to.replace("mlp.experts.down_proj", "block_sparse_moe.output_linear.weight")
            tensors[to] = tensors.pop(name)

    changed(whole, granite, renamed)
    require_readable(str(granite))
    name = "model.layers.1.block_sparse_moe.input_linear"
    broken = changed(granite, tmp_path / "granite cut", cut(f"{name}.weight", 8))
    assert refused(broken).what == f"{name} has 8 experts, but config.json says 16"


def judged(tensors: dict[str, tuple[int, ...]], **config: object) -> str:
    """Return the error for these tensors; empty if they are valid."""
    try:
        require_experts(tensors, {"num_hidden_layers": 4, "num_experts": 4, **config}, where="")
    except CheckpointError as error:
        return error.what
    return ""


def layer(index: int, *names: str, stack: str = "model.layers") -> dict[str, tuple[int, ...]]:
    rest = ("self_attn.q_proj.weight", "norm.weight", *names)
    return {f"{stack}.{index}.{name}": (8, 8) for name in rest}


def experts(count: int = 4, at: str = "mlp.experts", end: str = "weight") -> list[str]:
    return ["mlp.gate.weight", *(f"{at}.{e}.{p}.{end}" for e in range(count) for p in ("w1", "w2"))]


MOE = {name: shape for index in range(4) for name, shape in layer(index, *experts()).items()}
DENSE = layer(0, "mlp.down_proj.weight")
LATER = {name: shape for name, shape in MOE.items() if "layers.0." not in name}


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (MOE, {}),
        (MOE | {"model.embed_tokens.weight": (9, 8), "lm_head.weight": (9, 8)}, {}),
        (LATER | DENSE, {"first_k_dense_replace": 1}),
        (LATER | layer(0, "feed_forward.w1.weight"), {"num_dense_layers": 1}),
        # Layers of speculative decoding: beyond the last one, or in a stack of their own.
        (MOE | layer(4, *experts(3)), {}),
        (MOE | layer(4, "mlp.down_proj.weight", "eh_proj.weight"), {}),
        (MOE | layer(0, *experts(2), stack="mtp.layers"), {}),
        (MOE | layer(0, "fc1.weight", stack="visual.blocks"), {}),
        # Values that give no number of experts, or one number per layer.
        (MOE, {"num_experts": [2, 2]}),
        (LATER | layer(0, *experts(2)), {"num_experts": [2, 4, 4, 4]}),
        (MOE, {"num_experts": None}),
        (MOE, {"num_hidden_layers": None}),
        # Layers called mixers that contain attention or a state instead of experts.
        (LATER | layer(0, "mixer.in_proj.weight"), {}),
        # Quantised experts, some of which may lack scales.
        (
            {n: s for i in range(4) for n, s in layer(i, *experts(end="weight_packed")).items()}
            | {"model.layers.1.mlp.experts.2.w1.input_scale": ()},
            {},
        ),
        (
            {n: s for i in range(4) for n, s in layer(i, *experts(end="qweight")).items()}
            | {f"model.layers.1.mlp.experts.{e}.w1.scales": (2, 2) for e in range(2)},
            {},
        ),
        (LATER | layer(0, *experts(end="qweight")), {}),
        (
            {f"model.layers.{i}.mlp.experts.{name}": shape for i in range(4) for name, shape in
             (("gate_up_proj_blocks", (4, 8, 2, 16)), ("gate_up_proj_scales", (4, 8, 2)),
              ("gate_up_proj_bias", (4, 8)), ("down_proj", (4, 8, 8)))},
            {},
        ),
        # 3-dimensional tensors that are not experts.
        (MOE | {f"model.layers.{i}.linear_attn.conv1d.weight": (32, 1, 4) for i in range(4)}, {}),
        # A dense model whose config.json mentions experts, and unknown names.
        ({n: s for i in range(4) for n, s in layer(i, "mlp.down_proj.weight").items()}, {}),
        ({n: s for i in range(4) for n, s in layer(i, "ffn.experts.mlp.w1").items()}, {}),
    ],
    ids=count(),
)  # fmt: skip
def test_what_must_not_be_refused(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    assert judged(tensors, **config) == ""


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (MOE, {"num_experts": 5}, "layers.0.mlp.experts.4.w1.weight is missing"),
        (MOE, {"num_experts": [4, 4, 4, 5]}, "layers.3.mlp.experts.4.w1.weight is missing"),
        (LATER | layer(0, *experts(3)), {"num_experts": None}, "layers.0.mlp.experts.3.w1.weight"),
        (LATER | layer(0, *experts(3)), {"num_hidden_layers": None}, "layers.0.mlp.experts.3.w1"),
        (LATER | layer(0, "mlp.gate.weight"), {}, "layers.0.mlp.experts is missing"),
        (LATER | layer(0), {"num_experts": None}, "layers.0.mlp.experts is missing"),
        (MOE | layer(4, *experts()[:-1]), {}, "layers.4.mlp.experts.3.w2.weight is missing"),
        (MOE | layer(0, *experts()[:-1], stack="mtp"), {}, "mtp.0.mlp.experts.3.w2.weight is"),
        (LATER | layer(0, *experts(3, end="qweight")), {}, "layers.0.mlp.experts.3.w1."),
        ({n: (4, 8) for i in range(4) for n in layer(i, "mlp.gate.weight")}, {}, "all experts of"),
    ],
    ids=count(),
)
def test_what_must_be_refused(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], said: str
) -> None:
    assert said in judged(tensors, **config)


def test_other_formats_are_left_to_the_engine(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    require_readable(str(model))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{nonsense", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no model_type"),
        (None, "no config.json"),
    ],
)
def test_configurations(model: Path, text: str | None, what: str) -> None:
    path = model / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert what in refused(model).what


@pytest.mark.parametrize("architecture", ["qwen3-moe", "deepseek-v2", "qwen3-next"])
def test_keys_with_any_type(
    architecture: str, originals: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each key of config.json is read, ignored or refused, whatever its type."""
    shutil.copytree(originals(architecture), folder := tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    optional = {"sliding_window", "attention_chunk_size", "layer_types", "layers_block_type"}
    refused = set()
    for key in settings.keys() | optional:
        for value in (
            "x",
            "a\nb",
            -1,
            10**30,
            1.5,
            float("nan"),
            True,
            None,
            [],
            [1],
            {},
            {"a": 1},
        ):
            (folder / "config.json").write_text(json.dumps({**settings, key: value}))
            try:
                plan.of_checkpoint(folder)
            except FluxMoEError as error:
                assert "\n" not in str(error)
                refused.add(key)
    assert refused >= {"num_hidden_layers", "hidden_size", "max_position_embeddings", *optional}


@pytest.mark.parametrize("top_k", [-1, 0, True, 10**9])
def test_a_number_of_experts_per_token_that_cannot_be(model: Path, top_k: object) -> None:
    settings = json.loads((model / "config.json").read_text())
    text = json.dumps({**settings, "num_experts_per_tok": top_k})
    (model / "config.json").write_text(text)
    with pytest.raises(FluxMoEError, match=r"num_experts_per_tok|of 16 experts"):
        plan.of_checkpoint(model)


def test_names(model: Path) -> None:
    assert refused(model / "config.json").what == "the path is a file"
    for wrong in (f"{model}x", "./nothing", "~/nothing", "a/b/c", "two words", "gpt2"):
        assert refused(wrong).what == "no such folder"
    require_readable("Qwen/Qwen3-30B-A3B")  # looked up on the hub when loaded


def test_names_that_have_been_downloaded(pristine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--some--model"
    shutil.copytree(pristine, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    found = downloaded("some/model", cache=str(tmp_path))
    assert found == str(folder / "snapshots" / "abc")
    require_readable(found)
    for name in ("some/other", "./some/model", str(pristine)):
        assert downloaded(name, cache=str(tmp_path)) == name
    assert downloaded("some/model", "other", str(tmp_path)) == "some/model"


def test_every_door_refuses(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """Every way to start an engine, with every load format, checks the checkpoint first."""
    lacking = without(r"layers\.1\.mlp\.experts\.15\.")
    model = str(changed(originals("qwen3-moe"), tmp_path / "model", lacking))
    said = r"model\.layers\.1\.mlp\.experts\.15\.down_proj\.weight is missing"
    with pytest.raises(CheckpointError, match=said):
        fluxmoe.load(model, "8MiB")
    for load_format in ("auto", "safetensors", "hf"):
        settings = {"model": model, "memory": {"budget": "8MiB"}, "vllm": {"uds": "x"}}
        settings["vllm"]["load-format"] = load_format  # type: ignore[index]
        with pytest.raises(CheckpointError, match=said):
            found = Findings()
            checks.examine(config.parse(settings, where=""), {}, found, start="server")
            found.require()
    with pytest.raises(CheckpointError, match=said):
        plan.read(model)
    assert "experts.15" in refused(model).what
