"""MoE layers and their kernels."""

from __future__ import annotations

from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from fluxmoe.core.types import Phase


def current_phase() -> Phase:
    """What the running step does, from the attention metadata; decode if there is none.

    A prompt of one token cannot be told from a decode.
    """
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict) or not metadata:
        return Phase.DECODE
    longest = next(iter(metadata.values())).max_query_len
    return Phase.PREFILL if longest > 1 else Phase.DECODE


__all__ = ["CPUUnquantizedExperts", "RoutedExperts", "UnquantizedFusedMoEMethod", "current_phase"]
