"""``fluxmoe codec``: the compression of a checkpoint's experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxmoe.testing import checkpoints
from tests.commandline import fails, succeeds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Mixtral checkpoint, in which the experts' weights are named w1, w2 and w3."""
    return checkpoints.write(tmp_path_factory.mktemp("model") / "tiny", "mixtral")


def test_the_shipped_model_is_shortened_as_promised() -> None:
    printed = json.loads(succeeds("codec", "--json"))
    total = printed["total"]
    assert printed["codec"] == "fixed4" and len(printed["layers"]) == 6
    assert total["ratio"] >= 1.30 and total["plain"] == 0 and total["parts"] == 6 * 64 * 2
    assert total["raw_bytes"] == 6 * 64 * 3 * 64 * 160 * 2
    assert total["weights"] == total["segments"] * 128 == total["raw_bytes"] // 2
    assert total["escapes"] < 0.02 * total["segments"] and total["raw_segments"] < 10
    for key in ("raw_bytes", "coded_bytes", "escapes", "segments", "parts"):
        assert total[key] == sum(layer[key] for layer in printed["layers"])


def test_a_table_for_people(model: Path) -> None:
    printed = succeeds("codec", model)
    assert "layers.0" in printed and "all layers" in printed and "ratio" in printed
    assert "are kept uncompressed" not in printed
    assert "parts are kept uncompressed" in succeeds("codec", model, "--codec", "none")


def test_experts_that_lie_together_and_zeros(model: Path, tmp_path: Path) -> None:
    one_by_one = json.loads(succeeds("codec", model, "--json"))["total"]
    together = tmp_path / "together"
    shutil.copytree(model, together)
    weights = load_file(model / "model.safetensors")
    merged = {name: w for name, w in weights.items() if ".experts." not in name}
    layers = {name.partition(".experts.")[0] for name in weights if ".experts." in name}
    for layer in sorted(layers):
        count = sum(name.startswith(f"{layer}.experts.") and ".w2." in name for name in weights)
        halves = [
            torch.cat([weights[f"{layer}.experts.{e}.{w}.weight"] for w in ("w1", "w3")])
            for e in range(count)
        ]
        merged[f"{layer}.experts.gate_up_proj"] = torch.stack(halves)
        merged[f"{layer}.experts.down_proj"] = torch.stack(
            [weights[f"{layer}.experts.{e}.w2.weight"] for e in range(count)]
        )
    save_file(merged, together / "model.safetensors")
    same = json.loads(succeeds("codec", together, "--json"))["total"]
    assert same == one_by_one

    for name in merged:
        if name.endswith("down_proj"):
            merged[name][..., ::7] = 0
    save_file(merged, together / "model.safetensors")
    pruned = json.loads(succeeds("codec", together, "--json"))["total"]
    assert pruned["zeros"] > 0.04 * pruned["weights"]
    assert pruned["zero_coded"] > 1000 and pruned["raw_segments"] < 10
    assert np.isclose(pruned["ratio"], one_by_one["ratio"], rtol=1e-3)


def test_wrong_things(tmp_path: Path, model: Path) -> None:
    fails("codec", tmp_path / "nowhere", code="FM406", message="no such folder")
    fails("codec", tmp_path, code="FM406", message="no config.json")
    fails("codec", model, "--codec", "zip", code="FM306", message="unknown codec 'zip'")
    dense = tmp_path / "dense"
    shutil.copytree(model, dense)
    weights = load_file(model / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "_moe." not in name}
    save_file(kept, dense / "model.safetensors")
    fails("codec", dense, code="FM401", message="the checkpoint has no experts")
