"""A model whose routing is that of a recorded trace, in the formats of all engines.

Random routers flatter every cache, and real models cannot be had offline. This checkpoint is random
except that the routing and the next token are computed from the current token alone: a token's
embedding has one large number among its first ``TOKENS`` dimensions, to which attention and experts
add nothing. The routers read these dimensions and choose the experts of one step of the trace, and
the output layer chooses the next step's token. Any engine that computes the model correctly
therefore continues a prompt 5, 6, 7 with 8, 9, 10, and uses the experts of the trace's steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fluxmoe.trace import shipped
from fluxmoe.trace.reader import TraceReader

#: Steps of the trace, which are the tokens of the model.
TOKENS = 512
TRACE = "decode-1"
HIDDEN, HEADS, KV_HEADS, HEAD = 1024, 16, 4, 64
#: The large number of an embedding; the others are about 1.
_MARK = 32.0
_EXPERT = ("gate_proj", "up_proj", "down_proj")


def write(folder: Path, intermediate: int, seed: int = 0) -> Path:
    """Write the checkpoint, with one file per layer; return its folder.

    Args:
        folder: Folder to write; left unchanged if it contains the checkpoint.
        intermediate: Inner size of an expert, which has ``6 * HIDDEN * intermediate`` bytes.
        seed: Random seed of the weights.
    """
    reader = TraceReader(shipped.path(TRACE))
    meta = reader.meta
    layers, experts, top_k = meta.num_layers, meta.experts_per_layer, meta.top_k
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": TOKENS,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 1024,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    done = folder / "config.json"
    if done.is_file() and json.loads(done.read_text()) == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    routers = _routers(reader, layers, experts)
    index: dict[str, str] = {}
    for layer in range(layers):
        named = dict(_layer(layer, routers[layer], experts, intermediate, random))
        if layer == 0:
            named |= dict(_ends(random))
        file = f"model-{layer:05}.safetensors"
        save_file(named, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(named, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    done.write_text(json.dumps(config))  # written last
    return folder


def _routers(reader: TraceReader, layers: int, experts: int) -> torch.Tensor:
    """Make the routers' weights, ``[layers, experts, HIDDEN]``."""
    weights = torch.zeros(layers, experts, HIDDEN)
    for step, layer, _, routed in reader.events():
        if step >= TOKENS:
            break
        weights[layer, torch.from_numpy(routed).long(), step] = torch.linspace(
            0.2, 0.17, len(routed)
        )
    return weights.bfloat16()


def _random(random: torch.Generator, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=random) * shape[-1] ** -0.5).bfloat16()


def _ends(random: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    embedding = torch.randn(TOKENS, HIDDEN, generator=random)
    embedding[:, :TOKENS] = torch.eye(TOKENS) * _MARK
    output = torch.zeros(TOKENS, HIDDEN)
    output[:, :TOKENS] = torch.eye(TOKENS).roll(1, 0)
    yield "model.embed_tokens.weight", embedding.bfloat16()
    yield "lm_head.weight", output.bfloat16()
    yield "model.norm.weight", torch.ones(HIDDEN).bfloat16()


def _layer(
    layer: int, router: torch.Tensor, experts: int, intermediate: int, random: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    at = f"model.layers.{layer}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}{norm}.weight", torch.ones(HIDDEN).bfloat16()
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield f"{at}self_attn.{name}_proj.weight", _random(random, heads * HEAD, HIDDEN)
    for name in ("q_norm", "k_norm"):
        yield f"{at}self_attn.{name}.weight", torch.ones(HEAD).bfloat16()
    out = _random(random, HIDDEN, HEADS * HEAD)
    out[:TOKENS] = 0
    yield f"{at}self_attn.o_proj.weight", out
    yield f"{at}mlp.gate.weight", router.clone()
    for expert in range(experts):
        for part, shape in zip(
            _EXPERT, ((intermediate, HIDDEN),) * 2 + ((HIDDEN, intermediate),), strict=True
        ):
            weight = _random(random, *shape)
            if part == "down_proj":
                weight[:TOKENS] = 0
            yield f"{at}mlp.experts.{expert}.{part}.weight", weight


def write_stacked(model: Path, file: Path) -> Path:
    """Write the experts as transformers keeps them: ``[E, 2I, H]`` and ``[E, H, I]`` per layer."""
    if file.exists():
        return file
    config = json.loads((model / "config.json").read_text())
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        for layer in range(config["num_hidden_layers"]):
            weights = load_file(model / f"model-{layer:05}.safetensors")
            gate, up, down = (
                _stack(weights, layer, name, config["num_experts"]) for name in _EXPERT
            )
            for stacked in (torch.cat([gate, up], 1), down):
                stacked.view(torch.uint8).numpy().tofile(out)
    return part.rename(file)


def write_gguf(model: Path, file: Path) -> Path:
    """Write the model in llama.cpp's format, in bf16. The package ``gguf`` must be importable."""
    if file.exists():
        return file
    import gguf

    config = json.loads((model / "config.json").read_text())
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    layers = range(config["num_hidden_layers"])
    for name, (_, shape) in (_ENDS | {k: v for i in layers for k, v in _names(i, config)}).items():
        dtype, kind = (np.uint16, "BF16") if _is_matrix(name) else (np.float32, "F32")
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(
            name, shape, np.dtype(dtype), nbytes, gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for layer in layers:
        weights = load_file(model / f"model-{layer:05}.safetensors")
        names = dict(_names(layer, config))
        for name, (source, _) in ((_ENDS | names) if layer == 0 else names).items():
            if "_exps" in name:
                weight = _stack(weights, layer, source, config["num_experts"])
            else:
                weight = weights[source]
            writer.write_tensor_data(
                weight.view(torch.uint16).numpy() if _is_matrix(name) else weight.float().numpy()
            )
    writer.close()
    return part.rename(file)


def _is_matrix(name: str) -> bool:
    """True if a tensor of a GGUF file is stored in bf16."""
    return "norm" not in name and "gate_inp" not in name


#: Name in a GGUF file → (name in the checkpoint, shape).
_ENDS = {
    "token_embd.weight": ("model.embed_tokens.weight", (TOKENS, HIDDEN)),
    "output_norm.weight": ("model.norm.weight", (HIDDEN,)),
    "output.weight": ("lm_head.weight", (TOKENS, HIDDEN)),
}


def _names(layer: int, config: dict[str, Any]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield a layer's tensors, as in ``_ENDS``; those of experts have the part as their name."""
    experts, inner = config["num_experts"], config["moe_intermediate_size"]
    ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
    yield f"{theirs}attn_norm.weight", (f"{ours}input_layernorm.weight", (HIDDEN,))
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        source = f"{ours}self_attn.{name}_proj.weight"
        yield f"{theirs}attn_{name}.weight", (source, (heads * HEAD, HIDDEN))
    for name in ("q_norm", "k_norm"):
        yield f"{theirs}attn_{name}.weight", (f"{ours}self_attn.{name}.weight", (HEAD,))
    source = f"{ours}self_attn.o_proj.weight"
    yield f"{theirs}attn_output.weight", (source, (HIDDEN, HEADS * HEAD))
    yield f"{theirs}ffn_norm.weight", (f"{ours}post_attention_layernorm.weight", (HIDDEN,))
    yield f"{theirs}ffn_gate_inp.weight", (f"{ours}mlp.gate.weight", (experts, HIDDEN))
    for part, shape in (
        ("gate", (experts, inner, HIDDEN)),
        ("up", (experts, inner, HIDDEN)),
        ("down", (experts, HIDDEN, inner)),
    ):
        yield f"{theirs}ffn_{part}_exps.weight", (f"{part}_proj", shape)


def _stack(weights: dict[str, torch.Tensor], layer: int, part: str, experts: int) -> torch.Tensor:
    """Stack one part of all experts of a layer, ``[experts, …]``."""
    at = f"model.layers.{layer}.mlp.experts"
    return torch.stack([weights[f"{at}.{i}.{part}.weight"] for i in range(experts)])
