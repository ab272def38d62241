"""Random checkpoints of real architectures, written to disk as Hugging Face models.

Random routers show more locality than trained ones, so measurements on such checkpoints do not
indicate the quality of a policy. Tests of identity and of throughput at full load are unaffected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxmoe.errors import MissingDependencyError

_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_SMALL: dict[str, Any] = {
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
#: Settings for a dense first layer and shared experts.
_ROUTED: dict[str, Any] = {
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
}
#: The same with multi-head latent attention. vLLM's CPU backend supports the ranks 512 + 64.
_LATENT: dict[str, Any] = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
# vLLM makes a KV block as large as a layer's state. Here, states are small, and keys and values are
# large, so a block holds few tokens, and the prefixes in tests fill whole blocks.
_GATED_DELTA_NET: dict[str, Any] = {
    **_SMALL,
    "head_dim": 64,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}

#: Architecture → (class stem in transformers, settings of a small model).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3Moe",
        {**_SMALL, "head_dim": 32, "norm_topk_prob": True},
    ),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "olmoe": (
        "Olmoe",
        {"intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4},
    ),
    # A shared expert behind a gate in every layer.
    "qwen2-moe": (
        "Qwen2Moe",
        {**_SMALL, "shared_expert_intermediate_size": 128},
    ),
    "glm4-moe": (
        "Glm4Moe",
        {**_ROUTED, "head_dim": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **_LATENT,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
        },
    ),
    # A router with a correction bias, whose experts are chosen by group.
    "deepseek-v3": (
        "DeepseekV3",
        {
            **_LATENT,
            "n_shared_experts": 1,
            "topk_method": "noaux_tc",
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 64,
        },
    ),
    # Hybrids: one of four layers uses full attention, and the others keep a state of fixed size.
    # Each kind is a separate KV cache group in vLLM. Qwen uses Gated DeltaNet.
    "qwen3-next": ("Qwen3Next", {**_GATED_DELTA_NET, "norm_topk_prob": True}),
    # Published with its text configuration inside a multimodal one; vLLM also reads the text
    # configuration alone.
    "qwen3.5-moe": ("Qwen3_5Moe", _GATED_DELTA_NET),
    # Short convolutions, a dense first layer and a router with a correction bias.
    "lfm2-moe": (
        "Lfm2Moe",
        {
            **_SMALL,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "conv"],
            "tie_word_embeddings": True,
        },
    ),
    # Mamba-2, and experts whose gate and up projections are stored as one tensor per layer.
    "granite-hybrid": (
        "GraniteMoeHybrid",
        {
            "intermediate_size": 64,
            "shared_intermediate_size": 128,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "layer_types": ["mamba", "mamba", "mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 64,
            "position_embedding_type": "rope",
        },
    ),
    # A model without experts, which FluxMoE must reject.
    "qwen3-dense": ("Qwen3", {"head_dim": 32, "intermediate_size": 256}),
}


def write(path: Path, architecture: str = "qwen3-moe", *, seed: int = 0, **settings: Any) -> Path:
    """Write a random checkpoint and return its folder.

    Args:
        path: Folder to write; left unchanged if it already contains this checkpoint.
        architecture: A key of ``ARCHITECTURES``.
        seed: Random seed of the weights.
        settings: Changes to the architecture's configuration.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is needed to write a checkpoint", fix="pip install 'fluxmoe[hf]'"
        ) from error
    stem, special = ARCHITECTURES[architecture]
    wanted = {**_COMMON, **special, **settings}
    recipe = json.dumps({"architecture": architecture, "seed": seed, **wanted}, sort_keys=True)
    done = path / "recipe.json"
    if done.is_file() and done.read_text() == recipe:
        return path
    path.mkdir(parents=True, exist_ok=True)
    text = f"{stem}TextConfig"  # exists in a multimodal family
    config_class = getattr(transformers, text, None) or getattr(transformers, f"{stem}Config")
    config = config_class(**wanted, dtype="bfloat16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{stem}ForCausalLM")(config).to(torch.bfloat16)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" not in name:
                    # Wider than the usual 0.02, so that routing and next tokens differ.
                    weight.normal_(0.0, 0.06)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    done.write_text(recipe)  # written last, so that an incomplete checkpoint is written again
    return path


def byte_tokenizer() -> Any:
    """Make a tokenizer for any text, with one token per byte after three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
