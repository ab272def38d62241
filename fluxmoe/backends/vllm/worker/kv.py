"""vLLM's KV cache in the budget: the required bytes, and the cache's buffer in the KV arena."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fluxmoe import sizes
from fluxmoe.backends.budget import KVNeed
from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.compat.worker import max_memory_usage_bytes
from fluxmoe.config import ResolvedMemory
from fluxmoe.errors import BudgetTooSmallError, UnsupportedError


def need(vllm_config: VllmConfig, specs: Collection[Any]) -> KVNeed:
    """Compute the bytes that an engine's KV cache needs.

    Args:
        vllm_config: vLLM's configuration.
        specs: vLLM's ``KVCacheSpec`` of each layer.
    """
    block = sum(spec.page_size_bytes for spec in specs)
    one = max_memory_usage_bytes(vllm_config, specs)
    scheduler = vllm_config.scheduler_config

    def room(sequences: int) -> int:
        """Compute the bytes for some sequences, vLLM's null block, and the free watermark."""
        needed: int = math.ceil((sequences * one + block) / (1 - scheduler.watermark))
        return needed

    return KVNeed(
        min=room(1),
        max=room(scheduler.max_num_seqs),
        reason=f"one sequence of max-model-len {vllm_config.model_config.max_model_len}",
        block=block,
    )


def beside_all_experts(memory: ResolvedMemory, experts: int, need: KVNeed) -> int:
    """Compute the bytes of the KV cache without paging: at most the budget minus all experts.

    Raises:
        BudgetTooSmallError: The remaining budget is less than the KV cache needs.
    """
    room = memory.budget - experts
    if room < need.min:
        given, needed = sizes.apart(memory.budget, experts + need.min)
        raise BudgetTooSmallError(
            f"a budget of {given} is too small without paging: at least {needed} is needed, "
            f"{sizes.shown(experts)} for all experts and {sizes.shown(need.min)} for "
            f"the KV cache ({need.reason})",
            where="memory.budget",
            fix=f"set at least {sizes.at_least(experts + need.min)}, or remove preset: off",
        )
    wanted = [int(size) for size in (memory.kv.target, memory.kv.max) if size is not None]
    return max(min(room, *wanted) if wanted else room, need.min)


class FromArena(TorchFunctionMode):
    """A context in which vLLM's single allocation of the KV cache returns FluxMoE's buffer.

    vLLM's worker enters this context in place of its custom memory pool. vLLM allocates the cache
    with ``torch.zeros(nbytes, dtype=torch.int8)``; committed groups of the buffer are zero as well.

    Attributes:
        used: True if vLLM has requested the buffer.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self._buffer, self.used = buffer, False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = (self._buffer.numel(),)
        if func is torch.zeros and kwargs.get("dtype") is torch.int8 and args == wanted:
            self.used = True
            return self._buffer
        return func(*args, **kwargs)


def place(runtime: Runtime, config: Any) -> FromArena:
    """Place the KV cache in the budget.

    Args:
        runtime: Owner of the budget.
        config: vLLM's ``KVCacheConfig``. If the split may change, its layer placement is changed so
            that all layers of a block are adjacent.

    Raises:
        UnsupportedError: This model's KV cache does not allow that placement.
    """
    (nbytes,) = {tensor.size for tensor in config.kv_cache_tensors}
    if runtime.dynamic:
        _block_outermost(config)
    kv = runtime.place_kv(config.num_blocks, nbytes // config.num_blocks)
    return FromArena(torch.from_numpy(kv.buffer()).view(torch.int8))


def _block_outermost(config: Any) -> None:
    """Make all layers of a block adjacent, whereas vLLM's CPU layout separates the layers.

    The kernels allow this, because they receive the distance between blocks as a stride.
    """
    blocks = config.num_blocks
    tensors = []
    for tensor in config.kv_cache_tensors:
        page = tensor.block_stride
        if tensor.block_stride * blocks == tensor.size:  # already adjacent
            tensors.append(tensor)
            continue
        if tensor.layer_stride != page * blocks or tensor.size % blocks or tensor.offset % blocks:
            raise UnsupportedError(
                "the KV cache of this model cannot grow or shrink",
                where=f"layers {', '.join(tensor.layers[:2])} …",
                fix="set arbitration: fixed",
            )
        tensors.append(
            replace(
                tensor,
                offset=tensor.offset // blocks,
                layer_stride=page,
                block_stride=tensor.size // blocks,
            )
        )
    config.kv_cache_tensors = tensors
