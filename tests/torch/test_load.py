"""``fluxmoe.load``: the model of ``from_pretrained``, with its experts only in the store."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import fluxmoe
from fluxmoe import errors, machine
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
        with torch._C.DisableTorchFunctionSubclass():  # sealed weights appear to be in memory
            meta = {name: weight.is_meta for name, weight in paged.model.named_parameters()}
        assert all(
            is_meta == name.endswith(("gate_up_proj", "down_proj"))
            for name, is_meta in meta.items()
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
    """In transformers 5's layout, no tensors need assembling, and all are views of the file."""
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
    with pytest.raises(errors.BudgetTooSmallError, match=r"fluxmoe\.load; give at least 192KiB"):
        fluxmoe.load(checkpoint(), 196607)
    with pytest.raises(errors.UnknownPolicyError, match="known eviction policies"):
        fluxmoe.load(checkpoint(), eviction="lur")
    with pytest.raises(errors.NoExpertsError, match="no MoE layers"):
        fluxmoe.load(checkpoint("qwen3-dense"))
    with pytest.raises(errors.UnsupportedError, match=r"sonicmoe.*grouped_mm"):
        fluxmoe.load(checkpoint(), options={"experts_implementation": "sonicmoe"})
    with pytest.raises(errors.ConfigError, match="device_map cannot be set"):
        fluxmoe.load(checkpoint(), options={"device_map": "auto"})
    with pytest.raises(errors.ConfigError, match="plenty"):
        fluxmoe.load(checkpoint(), "plenty")
    assert held() == before


@pytest.fixture
def sharded(load: Load, tmp_path: Path) -> Path:
    load().save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    return tmp_path / "sharded"


def shard_of(folder: Path, ending: str) -> Path:
    """Find the shard that holds the first weight with this ending."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(file for name, file in index.items() if name.endswith(ending))


def remove(folder: Path) -> str:
    shard = shard_of(folder, "experts.3.up_proj.weight")
    shard.unlink()
    return "the file is missing"


def truncate(folder: Path) -> str:
    shard = shard_of(folder, "experts.3.up_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-1000])
    return "damaged or truncated"


def empty(folder: Path) -> str:
    shard = shard_of(folder, "lm_head.weight")
    shard.write_bytes(b"")
    return "damaged or truncated"


def overwrite_header(folder: Path) -> str:
    shard = shard_of(folder, "experts.3.up_proj.weight")
    shard.write_bytes(b"\xff" * 64 + shard.read_bytes()[64:])
    return "damaged or truncated"


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
    return r"up_proj\.weight is missing, but listed in model\.safetensors\.index\.json"


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
    return r"model\.norm\.weight is missing"


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


QUANTISED = {
    "fp8": ({"quant_method": "fp8"}, ".weight", torch.float8_e4m3fn),
    "gptq": ({"quant_method": "gptq", "bits": 4}, ".qweight", torch.int32),
    "awq": ({"quant_method": "awq", "bits": 4}, ".qweight", torch.int32),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "config_groups": {}}, ".weight", torch.int8,
    ),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, ".weight", torch.uint8),
    "mxfp4": ({"quant_method": "mxfp4"}, ".weight", torch.uint8),
    "": (None, ".weight", torch.float8_e4m3fn),
}  # fmt: skip


@pytest.mark.parametrize("method", QUANTISED)
def test_b11_quantised_checkpoints(load: Load, tmp_path: Path, method: str) -> None:
    """The error comes before transformers reads weights, and names the method and the layer."""
    load().save_pretrained(tmp_path)
    settings, ending, dtype = QUANTISED[method]
    reconfigure(tmp_path, **({"quantization_config": settings} if settings else {}))
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    for key in [key for key in weights if ".experts." in key]:
        weights[key.replace(".weight", ending)] = weights.pop(key).to(dtype)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(errors.QuantisedError) as caught:
        fluxmoe.load(tmp_path, "1MiB")
    error = caught.value
    assert (f"with {method} (" if method else "is quantised (") in error.what
    assert "model.layers.0.mlp.experts." in error.what and error.where == str(tmp_path)
    assert "unquantised" in error.fix


@pytest.mark.parametrize("count", [8, 32])
def test_b11_another_number_of_experts(load: Load, tmp_path: Path, count: int) -> None:
    load().save_pretrained(tmp_path)
    reconfigure(tmp_path, num_experts=count, num_local_experts=count)
    says = "has 16 experts, but config.json says 8" if count == 8 else r"experts\.16\..* is missing"
    with pytest.raises(errors.CheckpointError, match=rf"model\.layers\.0\.mlp.*{says}"):
        fluxmoe.load(tmp_path, "1MiB")


def test_b11_weights_of_another_shape(load: Load, tmp_path: Path) -> None:
    load().save_pretrained(tmp_path)
    reconfigure(tmp_path, moe_intermediate_size=96)
    with pytest.raises(errors.CheckpointError) as caught:
        fluxmoe.load(tmp_path, "2MiB")
    assert re.match(
        r"model\.layers\.0\.mlp\.experts\.down_proj is \[16, \d+, \d+\] in the checkpoint, but "
        r"\[16, \d+, 96\] according to config\.json, and \d more",
        caught.value.what,
    )


def test_b11_architectures_of_another_kind(tmp_path: Path) -> None:
    """Experts that exist but cannot be paged are not reported as absent."""
    for name, says in (("switch_transformers", "cannot build a causal"), ("doge", "expert layout")):
        AutoConfig.for_model(name, **SMALL_ONES.get(name, {})).save_pretrained(tmp_path / name)
        with pytest.raises(errors.UnsupportedError, match=rf"(?i){name.split('_')[0]}.*") as caught:
            fluxmoe.load(tmp_path / name, "1MiB", dtype="float32")
        assert says in str(caught.value)
    reconfigure(tmp_path / "doge", model_type="moe-of-2030")
    with pytest.raises(errors.UnsupportedError, match=r"unknown architecture.*moe-of-2030"):
        fluxmoe.load(tmp_path / "doge")


SMALL_ONES = {"doge": {"num_hidden_layers": 1, "is_moe": True}}


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PEAK = """
import re, sys, threading
import fluxmoe

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

for dtype in ("auto", "float32"):
    # torch and its kernels for these shapes need memory of their own, on some processors 40 MiB.
    fluxmoe.load(sys.argv[1], "16MiB", dtype=dtype).close()
    before, seen, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    paged = fluxmoe.load(sys.argv[1], "16MiB", dtype=dtype)
    done.set()
    watcher.join()
    print(max(seen) - before, paged.stats()["store_bytes"])
"""


def test_the_experts_are_in_memory_once(checkpoint: Callable[..., Path]) -> None:
    """Check unchanged and converted weights; arenas are shared memory and are not counted."""
    # Let freed memory return to the system at once, so that only memory in use is measured.
    # With more threads, grouped_mm of float32 can depend on the slots, and is refused.
    one = {"OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **one, "MALLOC_MMAP_THRESHOLD_": "65536"}
    shape = {"num_hidden_layers": 8, "moe_intermediate_size": 256, "hidden_size": 256}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(checkpoint(**shape))],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    for line, size in zip(done.stdout.splitlines(), (2, 4), strict=True):
        peak, experts = map(int, line.split())
        assert experts == 8 * 16 * 3 * 256 * 256 * size
        assert 0.9 * experts < peak < 1.4 * experts, line


def test_a4_memory_beside_the_weights_is_required_before_they_are_read(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        machine, "memory", lambda: machine.MemoryRoom(1 << 20, 1 << 20, "/sys/fs/cgroup/app")
    )
    with pytest.raises(errors.ConfigError, match=r"is needed .* limit of /sys/fs/cgroup/app"):
        fluxmoe.load(checkpoint("qwen3-moe"), "1023KiB")
