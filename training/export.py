"""Write a trained state as a Hugging Face folder, and measure the result.

    python training/export.py --state RUN/final --data FOLDER --out fluxmoe/demo/assets/NAME

Everything is measured on the shipped bf16 weights, in float32: bits per byte of the held-out text
by source, and the balance of each layer's router. ``measured.json`` in the output folder contains
the results, and ``README.md`` is the model card, filled in from ``card.md``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from network import Network
from routing import lru
from torch.nn import functional as F
from train import SETTINGS, WORKERS, token_ids
from transformers import GenerationConfig, Qwen3MoeConfig

from fluxmoe.testing.checkpoints import byte_tokenizer

LENGTH = 512


def weights(state: Path, averaged: bool) -> dict[str, torch.Tensor]:
    """Get a state's weights, or their running mean, rounded to bf16."""
    found = torch.load(state.with_suffix(".pt"))
    if averaged:
        for rank in range(WORKERS):
            found |= torch.load(state.with_suffix(f".{rank}.pt"))["averaged"]
    return {name: weight.bfloat16().float() for name, weight in found.items()}


@torch.no_grad()
def measure(model: Network, text: bytes, windows: int) -> tuple[float, torch.Tensor, int]:
    """Measure bits per byte in evenly spaced windows, the load [L, E], and the bytes predicted."""
    tokens = token_ids()[np.frombuffer(text, np.uint8)]
    windows = min(windows, (len(tokens) - 1) // LENGTH)
    starts = np.linspace(0, len(tokens) - LENGTH - 1, windows).astype(int)
    bits, loads = 0.0, 0
    for chunk in np.array_split(starts, -(-windows // 4)):
        ids = torch.from_numpy(np.stack([tokens[s : s + LENGTH + 1] for s in chunk]))
        logits, _, _, load = model(ids[:, :-1], torch.float32)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        bits += loss.item() / math.log(2)
        loads = loads + load
    return bits / (windows * LENGTH), loads, windows * LENGTH


def balance(load: torch.Tensor) -> list[dict[str, float]]:
    """Compute each layer's ratio of maximum to mean load, and its load's entropy in bits."""
    share = load / load.sum(1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-12).log2()).sum(1)
    return [
        {"max_over_mean": round(float(s.max() * len(s)), 2), "entropy_bits": round(float(e), 3)}
        for s, e in zip(share, entropy, strict=True)
    ]


def card(figures: dict[str, Any], data: Path, megabytes: float) -> str:
    """Fill in the model card."""
    c = Qwen3MoeConfig(**SETTINGS)
    experts = 3 * c.hidden_size * c.moe_intermediate_size * c.num_experts * c.num_hidden_layers
    return Template(Path(__file__).with_name("card.md").read_text()).substitute(
        layers=c.num_hidden_layers,
        experts=c.num_experts,
        top_k=c.num_experts_per_tok,
        hidden=c.hidden_size,
        expert_hidden=c.moe_intermediate_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        vocab=c.vocab_size,
        megabytes=f"{megabytes:.1f}",
        expert_share=round(2 * experts / (megabytes * 1e4)),
        steps=f"{figures['steps']:,}",
        bytes_seen=f"{figures['bytes_seen']:,}",
        held_out_bytes=f"{figures['held_out_bytes']:,}",
        held_rows="\n".join(f"| {n} | {v:.3f} |" for n, v in figures["held_out"].items()),
        layer_rows="\n".join(
            f"| {index} | {row['max_over_mean']:.2f} | {row['entropy_bits']:.2f} "
            f"| {row['lru_25_percent']:.1%} | {row['lru_50_percent']:.1%} |"
            for index, row in enumerate(figures["layers"])
        ),
        **{
            file.stem.replace("-", "_"): f"{file.stat().st_size:,}"
            for file in data.glob("train-*.txt")
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="a run's state, without .pt")
    parser.add_argument("--averaged", action="store_true", help="the running mean of the weights")
    parser.add_argument("--data", type=Path, required=True, help="folder that corpus.py made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help=f"of {LENGTH} bytes per source")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Network(Qwen3MoeConfig(**SETTINGS))
    model.load_state_dict(weights(args.state, args.averaged))
    model.eval()

    exported = model.export().to(torch.bfloat16)
    exported.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        **{f"{kind}_token_id": SETTINGS[f"{kind}_token_id"] for kind in ("pad", "bos", "eos")},
    )
    exported.save_pretrained(args.out)
    byte_tokenizer().save_pretrained(args.out)

    saved = torch.load(args.state.with_suffix(".0.pt"))
    figures: dict[str, Any] = {"steps": saved["steps"], "bytes_seen": saved["seen"], "held_out": {}}
    total, loads, bits = 0, 0, 0.0
    for file in sorted(args.data.glob("held-*.txt")):
        value, load, count = measure(model, file.read_bytes(), args.windows)
        figures["held_out"][file.stem.removeprefix("held-")] = round(value, 4)
        bits, loads, total = bits + value * count, loads + load, total + count
    figures["held_out"]["all"] = round(bits / total, 4)
    figures["held_out_bytes"] = total
    figures["layers"] = balance(loads.double())
    for row, rates in zip(figures["layers"], lru(args.out), strict=True):
        row["lru_25_percent"], row["lru_50_percent"] = (round(rate, 3) for rate in rates)
    (args.out / "measured.json").write_text(json.dumps(figures, indent=1) + "\n")
    size = (args.out / "model.safetensors").stat().st_size / 1e6
    (args.out / "README.md").write_text(card(figures, args.data, size))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
