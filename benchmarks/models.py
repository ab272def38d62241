"""Models for measurements of serving: the shipped one, and larger ones with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxmoe.demo.model import SHIPPED, DemoModel
from fluxmoe.testing import checkpoints

#: 18 MiB of experts, half of which every token uses, and 0.5 KiB of KV cache per token. Both
#: tenants matter in every phase (the KV cache of one long request is as large as a hundredth of the
#: experts), and steps take a few milliseconds.
BALANCED = {
    "num_hidden_layers": 4,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "hidden_size": 256,
    "moe_intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
#: 2.3 GiB of experts.
MID = {
    "num_hidden_layers": 12,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


RANDOM = {"balanced": BALANCED, "mid": MID}


def add_option(parser: argparse.ArgumentParser, *, default: str = "shipped") -> None:
    parser.add_argument("--model", choices=("shipped", *RANDOM), default=default)


def get(name: str, scratch: Path) -> DemoModel:
    """Get a model by name; a model with random weights is written below ``scratch``."""
    if name in RANDOM:
        return DemoModel.read(checkpoints.write(scratch / name, **RANDOM[name]))
    return DemoModel.read(SHIPPED)
