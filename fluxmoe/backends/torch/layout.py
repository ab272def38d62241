"""The expert layers of a Hugging Face model, with checks that their weights can be paged."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from fluxmoe.backends.tensors import pages_of
from fluxmoe.core.types import Geometry, PageClass
from fluxmoe.errors import NoExpertsError, UnsupportedError
from fluxmoe.inventory import TOP_K, has_experts

PARTS = ("gate_up_proj", "down_proj")

#: Part → parameter of an expert layer.
Weights: TypeAlias = dict[str, torch.nn.Parameter]

#: Model families for which tests compare a paged model's output with that of the unpaged model.
TESTED = ("Mixtral", "OLMoE", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V2", "DeepSeek-V3", "GLM4-MoE")

_SUPPORTED = (
    f"tested: {', '.join(TESTED)}; others work if their experts are a gate_up_proj "
    "[experts, 2·intermediate, hidden] and a down_proj [experts, hidden, intermediate] "
    "without biases"
)


def is_experts(module: torch.nn.Module) -> bool:
    """Return True if a module has experts and selects their implementation at run time."""
    # The decorator for experts classes in transformers sets these attributes.
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def name_of(model: torch.nn.Module, layer: torch.nn.Module) -> str:
    """Return the name or path of the model's checkpoint, or else the name of the model's class."""
    return str(getattr(layer.config, "name_or_path", "") or type(model).__name__)


def top_k_of(layer: torch.nn.Module) -> int | None:
    """Return the number of experts per token; None if the configuration does not state it."""
    found = (getattr(layer.config, key, None) for key in TOP_K)
    return next((int(value) for value in found if value), None)


def experts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """List the expert layers of a model, in order.

    Raises:
        NoExpertsError: The model has no expert layers.
        UnsupportedError: The expert layers cannot be paged.
    """
    name = type(model).__name__
    layers = [module for module in model.modules() if is_experts(module)]
    if not layers:
        if any(_three_dimensional(module) for module in model.modules()):
            raise _unsupported(f"{name} does not use transformers' experts interface")
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_dict") and has_experts(config.to_dict()):
            raise _unsupported(f"the expert layout of {name} is not supported yet")
        raise NoExpertsError(
            f"{name} has no MoE layers: there is nothing to page", fix="use it without FluxMoE"
        )
    for layer in layers:
        _require_standard(layer)
    return layers


def require_on_cpu(layers: list[torch.nn.Module]) -> None:
    """Raise UnsupportedError unless the experts' weights are in host memory."""
    for layer in layers:
        for part, weight in weights_of(layer).items():
            name = f"{type(layer).__name__}.{part}"
            if weight.is_meta:
                raise UnsupportedError(
                    f"{name} is on the meta device: the model has no expert weights",
                    fix="load its weights first, or let fluxmoe.load() do both",
                )
            if weight.device.type != "cpu":
                raise _unsupported(f"{name} is on {weight.device}; only the CPU is supported")


def weights_of(layer: torch.nn.Module) -> Weights:
    """Return the parameters that hold a layer's experts."""
    return {part: getattr(layer, part) for part in PARTS}


def describe(layers: list[torch.nn.Module]) -> tuple[Geometry, PageClass]:
    """Return the sizes of layers' experts. Raises UnsupportedError if the layouts differ."""
    return pages_of(layers, PARTS)


def _require_standard(layer: torch.nn.Module) -> None:
    name = type(layer).__name__
    for why, wrong in (
        ("keeps its weights transposed", layer.is_transposed),
        ("interleaves gate and up projection", not layer.is_concatenated),
        ("has experts with biases", layer.has_bias),
        ("has experts without a gate", not layer.has_gate),
        ("is split for expert parallelism", layer._is_expert_parallel),
    ):
        if wrong:
            raise _unsupported(f"{name} {why}, which cannot be paged yet")
    found = {key for key, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    if found != set(PARTS):
        raise _unsupported(f"{name} has the weights {', '.join(sorted(found)) or '(none)'}")
    for part, weight in weights_of(layer).items():
        if weight.ndim != 3 or not weight.is_contiguous() or not weight.dtype.is_floating_point:
            raise _unsupported(
                f"{name}.{part} is not a dense floating-point tensor [experts, rows, columns]"
            )


def _three_dimensional(module: torch.nn.Module) -> bool:
    return any(
        weight.ndim == 3 and name in PARTS
        for name, weight in module.named_parameters(recurse=False)
    )


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(what, fix=_SUPPORTED)
