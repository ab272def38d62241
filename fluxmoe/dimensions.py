"""The sizes of a model for planning, from its config.json and the headers of its weight files.

No weights are read. For a folder without weights, or for a hub name, the sizes are those of the
parameters that ``transformers`` would create.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fluxmoe import checkpoint
from fluxmoe.arguments import reason
from fluxmoe.checkpoint import (
    Tensor,
    headers,
    read_map,
    require_readable,
    text_part,
    weight_files,
)
from fluxmoe.core.types import Geometry, PageClass, Part
from fluxmoe.errors import (
    CheckpointError,
    MissingDependencyError,
    NoExpertsError,
    UnsupportedError,
)
from fluxmoe.inventory import EXPERTS, TOP_K, expert_tensor, has_experts
from fluxmoe.words import line

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_Count = Annotated[int, Field(ge=0, lt=1 << 31)] | None


class _Text(BaseModel):
    """Keys of a language model's ``config.json`` that sizes depend on; null means "not given"."""

    model_config = ConfigDict(strict=True)

    num_hidden_layers: _Count = None
    num_attention_heads: _Count = None
    num_key_value_heads: _Count = None
    hidden_size: _Count = None
    head_dim: _Count = None
    kv_lora_rank: _Count = None
    qk_rope_head_dim: _Count = None
    layer_types: list[str] | None = None
    layers_block_type: list[str] | None = None
    full_attention_interval: _Count = None
    attn_layer_period: _Count = None
    sliding_window: _Count = None
    attention_chunk_size: _Count = None
    max_position_embeddings: _Count = None


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a mixture-of-experts model. All sizes are in bytes.

    Attributes:
        name: Name as given by the user.
        architecture: The configuration's ``model_type``.
        layers: Number of layers; ``moe_layers`` of these layers have experts.
        experts: Number of experts per layer; a token uses ``top_k`` of these experts.
        page_bytes: Bytes of one expert.
        other_bytes: Bytes of all other weights, which are outside the budget.
        read_bytes: Bytes of the other weights that a step reads (all except an embedding table
            that only serves to look up rows).
        weight_bytes: Bytes of one weight of an expert.
        kv_bytes: Bytes of KV cache per token in the layers that keep all tokens.
        window_bytes, window: Bytes of KV cache per token in the layers that keep only the last
            ``window`` tokens, and the number of these tokens.
        longest: Maximum number of tokens per request; 0 if unknown.
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

    def paged(self, weight: int, workers: int = 1) -> tuple[Geometry, PageClass]:
        """Return the pages of one of several workers if weights have ``weight`` bytes each."""
        nbytes = self.page_bytes * weight // self.weight_bytes // workers
        part = Part("experts", nbytes, nbytes // weight)
        return Geometry(self.moe_layers, self.experts), PageClass((part,))

    def request_bytes(self, tokens: int) -> int:
        """Return the bytes of KV cache that a request with ``tokens`` tokens needs."""
        return self.kv_bytes * tokens + self.window_bytes * min(tokens, self.window)


def read(name: str) -> Model:
    """Read the sizes of a model.

    Args:
        name: A folder with a ``config.json``, with or without weights, or a hub name.

    Raises:
        CheckpointError, ConfigError: The model cannot be read.
        NoExpertsError: The model has no experts.
        UnsupportedError: The architecture is unknown, or the experts cannot be paged.
        MissingDependencyError: There are no local weights and ``transformers`` is not installed.
    """
    folder = Path(name)
    if os.path.isdir(folder) and weight_files(folder):
        require_readable(name)
        return of_checkpoint(folder)
    if os.path.isdir(folder) and any(folder.glob("*.bin")):
        raise UnsupportedError(
            "the weights are not in safetensors format", where=name, fix="convert the checkpoint"
        )
    if os.path.exists(folder) and not (folder / "config.json").is_file():
        raise CheckpointError(
            "there is no config.json", where=name, fix="name the folder of a checkpoint"
        )
    if not os.path.exists(folder):
        require_readable(name)  # distinguishes a hub name from a wrong path
    return _describe(name, *_parameters(name))


def of_checkpoint(folder: Path) -> Model:
    """Read the sizes of a model from its files. Raises the errors of ``read``."""
    return _describe(str(folder), read_map(folder / "config.json"), dict(headers(folder)))


def _parameters(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load a model's configuration, and create its parameters without allocating memory."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is needed to plan for a model without local weights",
            fix="pip install 'fluxmoe[hf]'",
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # the model's own code may raise anything
        raise checkpoint.not_loadable(name, error) from error
    data = config.to_dict()
    if not has_experts(data):
        raise _dense(name, str(config.model_type))
    with torch.device("meta"):
        try:
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=config.dtype or torch.bfloat16
            )
        except Exception as error:  # the model's own code may raise anything
            raise checkpoint.not_buildable(config.model_type, error, name) from error
    stored = model.state_dict()
    weights = [*model.named_parameters(), *model.named_buffers()]  # tied weights appear once
    return data, {
        key: Tensor(tuple(weight.shape), weight.element_size())
        for key, weight in weights
        if key in stored
    }


def _describe(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    architecture = str(config.get("model_type"))
    text = text_part(config)
    experts, top_k = _first(text, EXPERTS), _first(text, TOP_K)
    checkpoint.refuse_quantised(name, config)
    keys = _parse(name, text)
    layers = keys.num_hidden_layers or 0
    pages: dict[str, int] = defaultdict(int)  # bytes of the experts of each layer
    other = embedding = item = 0
    for key, tensor in tensors.items():
        where = _LAYER.search(key)
        if where and layers and int(where[1]) >= layers:
            continue  # a layer for speculative decoding, which is not loaded
        if ".experts." in key and key.endswith(".bias"):
            raise checkpoint.unknown_layout(architecture, f"{key} is a bias", name)
        one = expert_tensor(key, len(tensor.shape))
        if one is None:
            other += tensor.nbytes
            embedding += tensor.nbytes if "embed_tokens" in key else 0
            continue
        if one.expert is None:
            experts = tensor.shape[0]
        pages[one.owner] += tensor.nbytes
        item = tensor.itemsize
    if not experts and not has_experts(config):
        raise _dense(name, architecture)
    sizes = set(pages.values())
    for wrong, detail in (
        (not experts, f"config.json has none of {', '.join(EXPERTS)}, or not a number above 0"),
        (not pages, "no weights of experts have known names"),
        (not layers, "config.json has no num_hidden_layers"),
        (not top_k, f"config.json has none of {', '.join(TOP_K)}, or not a number above 0"),
        (top_k > experts, f"a token uses {top_k} of {experts} experts"),
        (len(sizes) > 1, "layers have experts of different sizes"),
        (any(size % max(experts, 1) for size in sizes), "the experts of a layer differ in size"),
    ):
        if wrong:
            raise checkpoint.unknown_layout(architecture, detail, name)
    tied = not any("lm_head" in key for key in tensors)
    kv, window, tokens = _kv_bytes(keys, item)
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
        longest=keys.max_position_embeddings or 0,
    )


def _parse(name: str, text: Mapping[str, Any]) -> _Text:
    try:
        return _Text.model_validate(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"][:1]))
        raise CheckpointError(
            f"{field}: {reason(first)}, not {line(first['input'], repr)}",
            where=str(Path(name, "config.json")),
            fix="correct the file, or download it again",
        ) from error


def _kv_bytes(text: _Text, item: int) -> tuple[int, int, int]:
    """Return the bytes per token in layers without and in layers with a window, and the window."""
    kinds = text.layer_types or text.layers_block_type
    if kinds:
        # Linear attention and state-space layers keep a state of fixed size: they do not count.
        kinds = [kind for kind in kinds if "attention" in kind and "linear" not in kind]
        layers = len(kinds)
        sliding = sum("sliding" in kind or "chunked" in kind for kind in kinds)
    else:
        every = text.full_attention_interval or text.attn_layer_period or 1
        layers, sliding = (text.num_hidden_layers or 0) // every, 0
    window = text.sliding_window or text.attention_chunk_size or 0
    if not window:
        sliding = 0
    heads = text.num_attention_heads or 1
    if text.kv_lora_rank:  # multi-head latent attention: one vector for all heads
        each = (text.kv_lora_rank + (text.qk_rope_head_dim or 0)) * item
    else:
        size = text.head_dim or (text.hidden_size or 0) // heads
        each = 2 * (text.num_key_value_heads or heads) * size * item
    return (layers - sliding) * each, sliding * each, window


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """Return the number under the first key that has one; from a list, the first layer's number."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if type(value) is int and value > 0:
            return value
    return 0


def _dense(name: str, architecture: str) -> NoExpertsError:
    return NoExpertsError(
        f"{architecture} has no MoE layers: there is nothing to page",
        where=name,
        fix="use it without FluxMoE",
    )
