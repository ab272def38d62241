"""vLLM's KV buffer out of the KV arena: reserved at its maximum, committed at its present size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fluxmoe.backends.runtime import Runtime
from fluxmoe.errors import UnsupportedError


class FromArena(TorchFunctionMode):
    """Inside this context vLLM's one allocation of the KV cache is answered with our buffer.

    It is the context that vLLM's worker enters for custom memory pools. vLLM allocates with
    ``torch.zeros(nbytes, dtype=torch.int8)``; where groups are committed, the buffer is zero.

    Attributes:
        used: Whether the buffer was asked for.
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
    """Give the KV cache its place in the budget.

    Args:
        runtime: Whose budget it is.
        config: vLLM's ``KVCacheConfig``, of which the placement of layers is changed if the split
            may change: then all layers of a block must lie together.

    Raises:
        UnsupportedError: This model's KV cache cannot be laid out so.
    """
    (nbytes,) = {tensor.size for tensor in config.kv_cache_tensors}
    if runtime.dynamic:
        _block_outermost(config)
    kv = runtime.place_kv(config.num_blocks, nbytes // config.num_blocks)
    return FromArena(torch.from_numpy(kv.buffer()).view(torch.int8))


def _block_outermost(config: Any) -> None:
    """Put all layers' pages of a block side by side; vLLM's CPU layout has each layer by itself.

    The kernels are given the distance of blocks as a stride, so it is theirs to follow.
    """
    blocks = config.num_blocks
    tensors = []
    for tensor in config.kv_cache_tensors:
        page = tensor.block_stride
        if tensor.block_stride * blocks == tensor.size:  # so already
            tensors.append(tensor)
            continue
        if tensor.layer_stride != page * blocks or tensor.size % blocks or tensor.offset % blocks:
            raise UnsupportedError(
                "the KV cache of this model cannot grow and shrink",
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
