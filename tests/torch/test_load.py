"""``fluxmoe.load``: what ``from_pretrained`` loads, with its experts in the store only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fluxmoe
from fluxmoe import errors
from tests.torch.conftest import Load, answer, held, prompts, same, sizes


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    "architecture", ["qwen3-moe", "mixtral", "glm4-moe", "deepseek-v2", "deepseek-v3"]
)
def test_it_answers_what_the_stock_model_answers(
    load: Load, checkpoint: Callable[..., Path], architecture: str, implementation: str
) -> None:
    stock = load(architecture, implementation)
    experts, pages, page_bytes = sizes(stock)
    with fluxmoe.load(
        checkpoint(architecture),
        (experts + 3) * page_bytes,
        options={"experts_implementation": implementation},
    ) as paged:
        assert same(answer(paged.model), answer(stock))
        assert all(
            weight.is_meta == name.endswith(("gate_up_proj", "down_proj"))
            for name, weight in paged.model.named_parameters()
            if ".experts." in name
        )
        stats = paged.stats()
        paged.check()
    assert (stats["slots"], stats["pages"]) == (experts + 3, pages)
    assert stats["misses"] > 0
    assert not paged.model.training


@pytest.mark.parametrize("dtype", [torch.float32, "float16"])
def test_another_type_of_numbers(load: Load, checkpoint: Callable[..., Path], dtype: Any) -> None:
    with fluxmoe.load(checkpoint("mixtral"), "3MiB", dtype=dtype) as paged:
        assert same(answer(paged.model), answer(load("mixtral", dtype=dtype)))


def test_experts_that_lie_together_in_several_shards(load: Load, tmp_path: Path) -> None:
    """As transformers 5 has them in memory: nothing to be put together, views of the file."""
    model = load()
    model.save_pretrained(tmp_path, save_original_format=False, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with fluxmoe.load(tmp_path, "1MiB") as paged:
        assert same(answer(paged.model), answer(model))


def test_after_close_it_has_no_experts(checkpoint: Callable[..., Path]) -> None:
    before = held()
    paged = fluxmoe.load(checkpoint(), "1MiB")
    with torch.no_grad():
        paged.model(**prompts())
        assert held() > before
        paged.close()
        paged.close()
        assert held() == before
        for implementation in ("grouped_mm", "eager"):
            paged.model.set_experts_implementation(implementation)
            with pytest.raises(errors.UnsupportedError, match=r"experts are gone.*load the model"):
                paged.model(**prompts())
    with pytest.raises(errors.UnsupportedError, match=r"meta device.*fluxmoe\.load"):
        fluxmoe.page(paged.model)
    with pytest.raises(errors.ConfigError, match="closed"):
        paged.stats()


def test_what_cannot_be_loaded_is_refused_before_weights_are_read(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    before = held()
    with pytest.raises(errors.BudgetTooSmallError, match=r"fluxmoe\.load; give at least 786432"):
        fluxmoe.load(checkpoint(), 786431)
    with pytest.raises(errors.UnknownPolicyError, match="known eviction policies"):
        fluxmoe.load(checkpoint(), eviction="lur")
    with pytest.raises(errors.NoExpertsError, match="no MoE layers"):
        fluxmoe.load(checkpoint("qwen3-dense"))
    with pytest.raises(errors.UnsupportedError, match=r"sonicmoe.*grouped_mm"):
        fluxmoe.load(checkpoint(), options={"experts_implementation": "sonicmoe"})
    with pytest.raises(errors.ConfigError, match="device_map cannot be chosen"):
        fluxmoe.load(checkpoint(), options={"device_map": "auto"})
    with pytest.raises(errors.ConfigError, match="plenty"):
        fluxmoe.load(checkpoint(), "plenty")
    assert held() == before


@pytest.fixture
def sharded(load: Load, tmp_path: Path) -> Path:
    load().save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    return tmp_path / "sharded"


def shard_of(folder: Path, ending: str) -> Path:
    """The shard that holds the first weight of that name."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(file for name, file in index.items() if name.endswith(ending))


def remove(folder: Path) -> str:
    shard = shard_of(folder, "experts.3.up_proj.weight")
    shard.unlink()
    return "the file is missing"


def truncate(folder: Path) -> str:
    shard = shard_of(folder, "experts.3.up_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-1000])
    return "it is damaged or cut off"


def empty(folder: Path) -> str:
    shard = shard_of(folder, "lm_head.weight")
    shard.write_bytes(b"")
    return "it is damaged or cut off"


def overwrite_header(folder: Path) -> str:
    shard = shard_of(folder, "experts.3.up_proj.weight")
    shard.write_bytes(b"\xff" * 64 + shard.read_bytes()[64:])
    return "it is damaged or cut off"


def change(folder: Path, ending: str, weight: torch.Tensor | None) -> None:
    shard = shard_of(folder, ending)
    weights = load_file(shard)
    name = next(name for name in weights if name.endswith(ending))
    del weights[name]
    if weight is not None:
        weights[name] = weight
    save_file(weights, shard, {"format": "pt"})


def lose_an_expert(folder: Path) -> str:
    change(folder, "layers.1.mlp.experts.3.up_proj.weight", None)
    return r"up_proj\.weight, which model\.safetensors\.index\.json promises"


def lose_all_of_a_layer(folder: Path) -> str:
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        kept = {k: w for k, w in weights.items() if "layers.1.mlp.experts" not in k}
        save_file(kept, file, {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        weights.update(load_file(file))
        file.unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return r"model\.layers\.1\.mlp\.experts is missing"


def lose_a_norm(folder: Path) -> str:
    change(folder, "model.norm.weight", None)
    return r"it has no model\.norm\.weight"


def wrong_shape(folder: Path) -> str:
    change(folder, "layers.1.mlp.experts.3.up_proj.weight", torch.zeros(3, 5))
    return "cannot load the model"


def break_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    return "not valid JSON"


def break_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "not valid JSON"


def no_type(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    return "does not state the type"


def only_pickles(folder: Path) -> str:
    for file in [*folder.glob("model*")]:
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return r"model\.safetensors"


def nothing(folder: Path) -> str:
    shutil.rmtree(folder)
    return "no such folder"


@pytest.mark.parametrize(
    "harm",
    [remove, truncate, empty, overwrite_header, lose_an_expert, lose_all_of_a_layer, lose_a_norm,
     wrong_shape, break_index, break_config, no_type, only_pickles, nothing],
)  # fmt: skip
def test_damaged_checkpoints(sharded: Path, harm: Callable[[Path], str]) -> None:
    before = held()
    says = harm(sharded)
    with pytest.raises((errors.CheckpointError, errors.ConfigError), match=says) as caught:
        fluxmoe.load(sharded, "1MiB")
    assert str(sharded) in caught.value.where
    assert held() == before


PEAK = """
import re, sys, threading
import fluxmoe

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

tiny, large = sys.argv[1:]
fluxmoe.load(tiny).close()  # what torch and transformers need for themselves
for dtype in ("auto", "float32"):
    before, seen, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    paged = fluxmoe.load(large, "16MiB", dtype=dtype)
    done.set()
    watcher.join()
    print(max(seen) - before, paged.stats()["store_bytes"])
"""


def test_the_experts_are_in_memory_once(checkpoint: Callable[..., Path]) -> None:
    """Both as they are in the checkpoint and converted; the arenas are not counted (shared)."""
    # What is freed goes back to the system at once, so that nothing but what is held is seen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    shape = {"num_hidden_layers": 8, "moe_intermediate_size": 256, "hidden_size": 256}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(checkpoint()), str(checkpoint(**shape))],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    for line, size in zip(done.stdout.splitlines(), (2, 4), strict=True):
        peak, experts = map(int, line.split())
        assert experts == 8 * 16 * 3 * 256 * 256 * size
        assert 0.9 * experts < peak < 1.4 * experts, line
