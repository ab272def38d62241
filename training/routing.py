"""LRU hit rate per layer for the model's routing during generation."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fluxmoe
from fluxmoe.core.types import Phase
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import TraceMeta, TraceReader, TraceWriter

#: Prompts, continued one after the other, and number of bytes to generate for each.
PROMPTS = ("And the LORD said", "She had never been", "The function returns", "It is said that")
BYTES = 256


def lru(folder: Path, shares: tuple[float, ...] = (0.25, 0.5)) -> list[list[float]]:
    """Compute the hit rates per layer, by share of the layer's experts that fit.

    The sampled sequences are generated one after the other. Each layer is simulated separately, so
    that layers do not compete.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    with TemporaryDirectory() as scratch:
        trace = Path(scratch) / "all.parquet"
        with fluxmoe.page(model, memory="1GiB") as paged, paged.record(trace, replace=True):
            torch.manual_seed(0)
            for prompt in PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt")
                model.generate(**ids, max_new_tokens=BYTES, temperature=0.8, eos_token_id=None)
        parts = [Path(scratch) / f"{layer}.parquet" for layer in range(layers)]
        meta = TraceMeta(folder.name, 1, experts, model.config.num_experts_per_tok, None, "sampled")
        writers = [TraceWriter(part, meta, replace=True) for part in parts]
        for step, layer, phase, ids in TraceReader(trace).events():
            if phase == Phase.DECODE:
                writers[layer].append(step, 0, ids[None])
        for writer in writers:
            writer.close()
        slots = [int(share * experts) for share in shares]
        return [[simulate(part, "lru", count).hit_rate for count in slots] for part in parts]
