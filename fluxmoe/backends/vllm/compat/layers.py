"""MoE layers and their kernels."""

from __future__ import annotations

from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

__all__ = ["CPUUnquantizedExperts", "RoutedExperts", "UnquantizedFusedMoEMethod"]
