"""What is wrong with a checkpoint is seen before anything tries to load it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxmoe.checkpoint import require_readable
from fluxmoe.errors import CheckpointError
from fluxmoe.testing import checkpoints

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
    assert "damaged or cut off" in error.what
    assert error.where == str(model / WEIGHTS)


def test_an_expert_that_is_missing(model: Path) -> None:
    """vLLM loads such a file and computes with what the memory happened to hold."""
    tensors = load_file(model / WEIGHTS)
    del tensors[EXPERT]
    save_file(tensors, model / WEIGHTS)
    assert refused(model).what == f"{EXPERT} is missing"
    for name in [name for name in tensors if ".experts.3." in name]:
        del tensors[name]  # of every layer, a gap in the numbers
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
    assert "it has no more, which" in error.what
    assert error.where == str(model / "a.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (model / "b.safetensors").unlink()
    error = refused(model)
    assert "the file is missing" in error.what
    assert error.where == str(model / "b.safetensors")
    (model / INDEX).write_text(json.dumps({}))
    assert "no weight_map" in refused(model).what
    (model / INDEX).unlink()
    assert "is missing" in refused(model).what  # half of the experts, and nothing says so


def test_other_formats_are_left_to_the_engine(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    require_readable(str(model))


@pytest.mark.parametrize(
    ("text", "what"),
    [("{nonsense", "no JSON"), ("[]", "no map"), ("{}", "no model_type"), (None, "no config.json")],
)
def test_configurations(model: Path, text: str | None, what: str) -> None:
    path = model / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert what in refused(model).what


def test_names(model: Path) -> None:
    assert refused(model / "config.json").what == "it is a file"
    for wrong in (f"{model}x", "./nothing", "~/nothing", "a/b/c", "two words"):
        assert refused(wrong).what == "no such folder"
    require_readable("Qwen/Qwen3-30B-A3B")  # whoever loads it looks on the hub
    require_readable("gpt2")
