"""Rejection at startup of vLLM features that FluxMoE does not support."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxmoe.backends.vllm.compat.worker import (
    CPUUnquantizedExperts,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from fluxmoe.backends.vllm.features import refused_settings
from fluxmoe.backends.vllm.names import NAMES
from fluxmoe.backends.vllm.settings import moving_latent_attention
from fluxmoe.backends.vllm.worker.layer import PagedRoutedExperts
from fluxmoe.checkpoint import quantised
from fluxmoe.errors import UnsupportedError

if TYPE_CHECKING:
    from fluxmoe.backends.vllm.compat.plugin import VllmConfig


def refuse_unsupported(config: VllmConfig) -> None:
    """Reject engine features that paging was not tested with.

    Raises:
        UnsupportedError: Such a feature is enabled.
    """
    for error in refused_settings(config):
        raise error


def refuse_moving_split(config: VllmConfig) -> None:
    """Reject models whose KV cache cannot be resized while the engine serves.

    Raises:
        UnsupportedError: The model uses MLA. vLLM's CPU kernel for MLA flattens a layer's cache, so
            the layers of a block cannot be adjacent.
    """
    if config.model_config.use_mla:
        raise moving_latent_attention()


def refuse_unpageable(experts: RoutedExperts) -> None:
    """Reject expert layers whose weights are not plain parts that the kernel addresses by slot.

    Raises:
        UnsupportedError: The experts have a model-specific class or are quantised, or the kernel is
            not vLLM's CPU grouped GEMM.
        UnsupportedVersionError: vLLM has renamed an attribute.
    """
    NAMES.require_on("RoutedExperts", experts)
    where = experts.layer_name
    if not isinstance(experts, PagedRoutedExperts):
        raise UnsupportedError(
            f"experts of this architecture ({type(experts).__name__}) cannot be paged yet",
            where=where,
        )
    method = experts.quant_method
    if not isinstance(method, UnquantizedFusedMoEMethod):
        raise quantised(f"the experts use {type(method).__name__}", where)
    NAMES.require_on("UnquantizedFusedMoEMethod", method)
    if method.moe_kernel is not None:
        NAMES.require_on("FusedMoEKernel", method.moe_kernel)
    kernel = method.moe_kernel.fused_experts if method.moe_kernel is not None else None
    if not isinstance(kernel, CPUUnquantizedExperts):
        raise UnsupportedError(
            f"the MoE kernel {type(kernel).__name__} does not read experts by slot", where=where
        )
    NAMES.require_on("CPUUnquantizedExperts", kernel)
    if kernel._use_zentorch:
        raise UnsupportedError(
            "zentorch's MoE kernel does not read experts by slot",
            where=where,
            fix="uninstall zentorch",
        )
    NAMES.require_on("unquantised RoutedExperts", experts)
    for name, _ in experts.named_parameters(recurse=False):
        # Other parameters, such as a router's correction bias, are read by expert id and remain.
        if name.startswith(("w13", "w2")) and name not in ("w13_weight", "w2_weight"):
            raise UnsupportedError(f"experts with a {name} cannot be paged yet", where=where)
