"""The checkpoints of the matrix."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fluxmoe.demo
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.types import Geometry, PageClass
from fluxmoe.testing import checkpoints
from tests.identity.cells import RANDOM, SHIPPED

FRAME = 4096

#: A dense first layer is not an MoE layer, so four MoE layers are left, as in the other models.
DENSE_FIRST = {"num_hidden_layers": 5}
SETTINGS: dict[str, dict[str, object]] = {
    "glm4-moe": DENSE_FIRST,
    "deepseek-v2": DENSE_FIRST,
    "deepseek-v3": DENSE_FIRST,
    "lfm2-moe": {**DENSE_FIRST, "layer_types": ["conv", "full_attention", *["conv"] * 3]},
}


def shipped() -> Path | None:
    """Return the folder of the trained model, if the model is in the package."""
    assets = Path(fluxmoe.demo.__file__).parent / "assets"
    found = sorted(path.parent for path in assets.rglob("config.json"))
    return found[0] if found else None


def names() -> list[str]:
    """List all available models of the matrix."""
    return [*([SHIPPED] if shipped() else []), *RANDOM]


def write(folder: Path, model: str) -> Path:
    """Return the checkpoint's folder; a random checkpoint is first written below ``folder``."""
    if model == SHIPPED:
        path = shipped()
        assert path is not None
        return path
    return checkpoints.write(folder / model, model, **SETTINGS.get(model, {}))


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a checkpoint: pages of all layers, and vocabulary size."""

    geometry: Geometry
    page_class: PageClass
    vocabulary: int

    def slots(self, share: str) -> int:
        """Compute the number of slots for a cell's ``slots``."""
        experts, pages = self.geometry.experts_per_layer, self.geometry.num_pages
        return {"one layer": experts, "half": pages // 2, "all": pages}[share]

    def arena_bytes(self, share: str, banks: int) -> int:
        """Compute the bytes for exactly that number of slots, in whole frames."""
        slots = self.slots(share)
        assert slots % banks == 0
        return banks * frames_for(self.page_class, slots // banks, FRAME) * FRAME


@cache
def shape(path: Path) -> Shape:
    """Read the sizes from the checkpoint's configuration, without loading weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fluxmoe.backends.torch import layout

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
    # This does not use layout.experts_of, which refuses weights on the meta device.
    layers = [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(m, "has_gate")]
    geometry, page_class = layout.describe(layers)
    return Shape(geometry, page_class, vocabulary)
