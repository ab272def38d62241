"""The models that serving is measured with: the shipped one, and one a hundred times its size."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxmoe.demo.model import SHIPPED, DemoModel
from fluxmoe.testing import checkpoints

#: 2.3 GiB of experts; the weights are random.
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


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("shipped", "mid"), default="shipped")


def get(name: str, scratch: Path) -> DemoModel:
    """The model of that name; the large one is written below ``scratch``."""
    mid = name == "mid"
    return DemoModel.read(checkpoints.write(scratch / "mid", **MID) if mid else SHIPPED)
