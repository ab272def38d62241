"""vLLM's KV buffer in the KV arena: reserved at its maximum, committed at its current size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fluxmoe.backends.runtime import Runtime
from fluxmoe.errors import UnsupportedError


class FromArena(TorchFunctionMode):
    """Context in which vLLM's single allocation of the KV cache returns our buffer.

    vLLM's worker enters it in place of its custom memory pool. vLLM allocates with
    ``torch.zeros(nbytes, dtype=torch.int8)``; committed groups of the buffer are zero.

    Attributes:
        used: True once the buffer was requested.
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
        config: vLLM's ``KVCacheConfig``. If the split may change, the placement of layers in it is
            changed so that all layers of a block lie together.

    Raises:
        UnsupportedError: This model's KV cache cannot be laid out that way.
    """
    (nbytes,) = {tensor.size for tensor in config.kv_cache_tensors}
    if runtime.dynamic:
        _block_outermost(config)
    kv = runtime.place_kv(config.num_blocks, nbytes // config.num_blocks)
    return FromArena(torch.from_numpy(kv.buffer()).view(torch.int8))


def _block_outermost(config: Any) -> None:
    """Put the pages of all layers of a block side by side; vLLM's CPU layout separates layers.

    The kernels receive the distance between blocks as a stride and follow it.
    """
    blocks = config.num_blocks
    tensors = []
    for tensor in config.kv_cache_tensors:
        page = tensor.block_stride
        if tensor.block_stride * blocks == tensor.size:  # already so
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
