"""What a plan must know of a model: sizes, from its config.json and the headers of its weights.

No weight is read. Where a folder has no weights, or a name on a hub was given, the sizes are those
of the parameters that ``transformers`` would make.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmoe.checkpoint import Tensor, headers, quantised, read_map, require_readable, text_part
from fluxmoe.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    NoExpertsError,
    UnsupportedError,
)
from fluxmoe.inventory import EXPERTS

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
#: ``experts.7.down_proj.weight``, or ``experts.down_proj`` for all experts of a layer, which
#: GraniteMoE calls ``block_sparse_moe.output_linear``.
_ONE = re.compile(r"(.*)\.experts\.(\d+)\.(.+)")
_ALL = re.compile(
    r"(.*)\.(?:experts\.([a-z]\w*)|block_sparse_moe\.((?:in|out)put_linear))(?:\.weight)?"
)


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a mixture-of-experts model. All sizes are in bytes.

    Attributes:
        name: As the user named it.
        architecture: Its ``model_type``.
        layers: All layers; ``moe_layers`` have experts.
        experts: Per layer, of which a token uses ``top_k``.
        page_bytes: One expert.
        other_bytes: All other weights: they lie outside the budget.
        read_bytes: The part of them that a step reads (all but the rows of an embedding).
        weight_bytes: One weight of an expert.
        kv_bytes: KV cache of one token in the layers that keep all tokens.
        window_bytes, window: The same in those that keep the last ``window`` tokens.
        longest: Tokens that a request may have; 0 if the model does not say.
    """

    name: str
    architecture: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    page_bytes: int
    other_bytes: int
    read_bytes: int
    weight_bytes: int
    kv_bytes: int
    window_bytes: int
    window: int
    longest: int

    @property
    def pages(self) -> int:
        return self.moe_layers * self.experts

    @property
    def experts_bytes(self) -> int:
        return self.pages * self.page_bytes

    def request_bytes(self, tokens: int) -> int:
        """KV cache of a request of so many tokens."""
        return self.kv_bytes * tokens + self.window_bytes * min(tokens, self.window)


def read(name: str) -> Model:
    """The sizes of a model.

    Args:
        name: A folder with a ``config.json``, with or without weights, or a name on a hub.

    Raises:
        CheckpointError, ConfigError: It cannot be read.
        NoExpertsError: It has no experts.
        UnsupportedError: Its architecture is not known, or its experts cannot be paged.
        MissingDependencyError: It has no weights here, and ``transformers`` is not installed.
    """
    folder = Path(name)
    if folder.is_dir() and any(folder.glob("*.safetensors*")):
        require_readable(name)
        return _describe(name, read_map(folder / "config.json"), dict(headers(folder)))
    if folder.is_dir() and any(folder.glob("*.bin")):
        raise UnsupportedError(
            "its weights are not in safetensors", where=name, fix="convert the checkpoint"
        )
    if folder.exists() and not (folder / "config.json").is_file():
        raise CheckpointError(
            "there is no config.json", where=name, fix="name the folder of a checkpoint"
        )
    if not folder.exists():
        require_readable(name)  # which tells a name on a hub from a path that is wrong
    return _describe(name, *_parameters(name))


def _parameters(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model's configuration, and the parameters it would have: made, but without memory."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is needed to plan for a model without weights",
            fix="pip install 'fluxmoe[hf]'",
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except ValueError as error:
        raise UnsupportedError(f"unknown architecture: {_first_line(error)}", where=name) from error
    except OSError as error:
        raise ConfigError(
            f"cannot load the model: {_first_line(error)}",
            where=name,
            fix="name a folder with a Hugging Face checkpoint",
        ) from error
    data = config.to_dict()
    if not _first(text_part(data), EXPERTS):
        raise _dense(name, str(config.model_type))
    with torch.device("meta"):
        try:
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=config.dtype or torch.bfloat16
            )
        except (ValueError, RuntimeError) as error:
            raise UnsupportedError(
                f"unknown architecture: {_first_line(error)}", where=name
            ) from error
    stored = model.state_dict()
    weights = [*model.named_parameters(), *model.named_buffers()]  # tied ones are there once
    return data, {
        key: Tensor(tuple(weight.shape), weight.element_size())
        for key, weight in weights
        if key in stored
    }


def _describe(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    architecture = str(config.get("model_type"))
    text = text_part(config)
    experts, top_k = _first(text, EXPERTS), _first(text, _TOP_K)
    if config.get("quantization_config"):
        raise quantised("the checkpoint is quantised", name)
    layers = text.get("num_hidden_layers")
    pages: dict[str, int] = defaultdict(int)  # bytes of the experts of each layer
    other = embedding = item = 0
    for key, tensor in tensors.items():
        where = _LAYER.search(key)
        if where and isinstance(layers, int) and int(where[1]) >= layers:
            continue  # of speculative decoding, which nobody loads
        match = _ONE.fullmatch(key) or (_ALL.fullmatch(key) if len(tensor.shape) == 3 else None)
        if match is None:
            other += tensor.nbytes
            embedding += tensor.nbytes if "embed_tokens" in key else 0
            continue
        if "bias" in match[match.lastindex or 1]:
            raise UnsupportedError("experts with biases cannot be paged yet", where=key)
        if _ALL.fullmatch(key) and not _ONE.fullmatch(key):
            experts = tensor.shape[0]
        pages[match[1]] += tensor.nbytes
        item = tensor.itemsize
    if not experts:
        raise _dense(name, architecture)
    if not pages or not isinstance(layers, int) or not top_k:
        raise UnsupportedError(
            f"unknown architecture {architecture!r}: it has {experts} experts a layer, but under "
            "names that this command does not know",
            where=name,
        )
    sizes = set(pages.values())
    if len(sizes) > 1 or sizes.pop() % experts:
        raise UnsupportedError("layers with experts of different layouts", where=name)
    tied = not any("lm_head" in key for key in tensors)
    kv, window, tokens = _kv_bytes(text, layers, item)
    return Model(
        name=name,
        architecture=architecture,
        layers=layers,
        moe_layers=len(pages),
        experts=experts,
        top_k=top_k,
        page_bytes=next(iter(pages.values())) // experts,
        other_bytes=other,
        read_bytes=other if tied else other - embedding,
        weight_bytes=item,
        kv_bytes=kv,
        window_bytes=window,
        window=tokens,
        longest=text.get("max_position_embeddings") or 0,
    )


def _kv_bytes(config: Mapping[str, Any], layers: int, item: int) -> tuple[int, int, int]:
    """Bytes per token in layers that keep all tokens, in those with a window, and that window."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if not kinds:
        every = config.get("full_attention_interval") or config.get("attn_layer_period") or 1
        kinds = ["attention"] * (layers // every)
    # Linear attention and state-space layers keep a state of one size, whatever the length.
    attention = [kind for kind in kinds if "attention" in kind and "linear" not in kind]
    sliding = sum("sliding" in kind or "chunked" in kind for kind in attention)
    window = config.get("sliding_window") or config.get("attention_chunk_size") or 0
    if not window:
        sliding = 0
    heads = config.get("num_attention_heads") or 1
    if config.get("kv_lora_rank"):  # multi-head latent attention: one vector for all heads
        each = (config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0)) * item
    else:
        size = config.get("head_dim") or config["hidden_size"] // heads
        each = 2 * (config.get("num_key_value_heads") or heads) * size * item
    return (len(attention) - sliding) * each, sliding * each, window


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The first of these keys that is there; a list has one number per layer."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and value:
            return value
    return 0


def _dense(name: str, architecture: str) -> NoExpertsError:
    return NoExpertsError(
        f"{architecture} has no MoE layers: there is nothing to page",
        where=name,
        fix="use it without FluxMoE",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
