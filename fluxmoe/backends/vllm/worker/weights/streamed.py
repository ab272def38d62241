"""vLLM's method for unquantised experts, for layers that never hold the experts' weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from fluxmoe.backends.vllm.compat.worker import RoutedExperts, UnquantizedFusedMoEMethod

#: Parameters of a layer that hold its experts; each is a part of the experts' pages.
PARTS = ("w13_weight", "w2_weight")

_STREAMED = ContextVar("_STREAMED", default=False)

#: Name, shape and dtype of packed weights → memory for one expert, which contains zeros.
Shared = dict[object, torch.Tensor]


class StreamedMoEMethod(UnquantizedFusedMoEMethod):
    """vLLM's method, with parameters on the meta device until ``set_up``."""

    def create_weights(self, layer: RoutedExperts, *args: Any, **kw: Any) -> None:
        """Create the layer's parameters on the meta device, without memory."""
        with torch.device("meta"):
            super().create_weights(layer, *args, **kw)

    def set_up(self, layer: RoutedExperts, shared: Shared) -> None:
        """Set up the kernel; afterwards, the parameters have the kernel's packed shapes.

        All experts of all layers share the memory of one expert, which contains zeros.

        Args:
            layer: The layer.
            shared: The shared memory; pass the same dictionary for all layers.
        """
        before = {name: getattr(layer, name) for name in PARTS}
        for name, weight in before.items():
            one = torch.zeros((1, *weight.shape[1:]), dtype=weight.dtype, device="cpu")
            setattr(layer, name, torch.nn.Parameter(one, requires_grad=False))
        super().process_weights_after_loading(layer)
        for name, weight in before.items():
            packed = getattr(layer, name).data
            packed = shared.setdefault((name, packed.shape, packed.dtype), packed)
            every = torch.nn.Parameter(packed.expand(len(weight), *packed.shape[1:]), False)
            vars(every).update(vars(weight))  # attributes such as vLLM's weight_loader
            setattr(layer, name, every)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Do nothing: each expert was processed when it was loaded."""


@contextmanager
def streamed_layers() -> Iterator[None]:
    """Make layers that are built within the ``with`` block use ``StreamedMoEMethod``."""
    token = _STREAMED.set(True)
    try:
        yield
    finally:
        _STREAMED.reset(token)


def streamed(method: Any, moe_config: Any) -> Any:
    """Return the method for a layer that is being built, given the method that vLLM chose."""
    if _STREAMED.get() and type(method) is UnquantizedFusedMoEMethod:
        return StreamedMoEMethod(moe_config)
    return method
