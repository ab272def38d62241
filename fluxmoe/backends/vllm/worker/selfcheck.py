"""The self-check of the MoE kernel in use, with ``backends.selfcheck``, on a layer of the model."""

from __future__ import annotations

import torch

from fluxmoe.backends.selfcheck import Checked, Parts, require_slot_independence
from fluxmoe.backends.vllm.compat.worker import RoutedExperts


def require_sound(layer: RoutedExperts, parts: tuple[str, ...]) -> Checked:
    """Check the kernel of a layer that is not yet bound to a pager.

    Args:
        layer: An MoE layer; its weights are restored afterwards.
        parts: Names of the layer's parameters that hold experts.

    Raises:
        UnsupportedError: The kernel's results depend on the slots, or the kernel fails.
    """

    def kernel(
        given: Parts,
        table: torch.Tensor | None,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
    ) -> torch.Tensor:
        slots = experts if table is None else table[experts]
        own = {name: getattr(layer, name).data for name in given}
        try:
            for name, weight in given.items():
                getattr(layer, name).data = weight
            out: torch.Tensor = layer.forward_modular(x, weights, slots.to(torch.int32))
            return out
        finally:
            for name, weight in own.items():
                getattr(layer, name).data = weight

    like = {name: getattr(layer, name) for name in parts}
    fused = layer.quant_method.moe_kernel.fused_experts
    return require_slot_independence(
        kernel,
        like,
        hidden=layer.hidden_size,
        top_k=layer.top_k,
        name=f"{type(fused).__name__} ({fused.isa})",
        fix="serve this model without FluxMoE on this machine",
    )
