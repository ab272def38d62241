"""vLLM's loading of weights into a running model.

vLLM restores each module to its state before it was first loaded (on the meta device), loads the
module, repeats the processing that follows loading (on a CPU, this packs the weights), and copies
the result into the module's tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from fluxmoe.backends.sealed import Sealed
from fluxmoe.backends.vllm.names import NAMES

NAMES.require("reload")  # otherwise, the imports below would raise an error without a remedy

from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS


def exempt(module: torch.nn.Module) -> None:
    """Make ``initialize_layerwise_reload`` skip a module until ``readmit`` is called."""
    get_layerwise_info(module).load_numel_total = 0


def readmit(module: torch.nn.Module) -> None:
    """Reset the state of a module that is exempt or being loaded."""
    get_layerwise_info(module).reset()


def unloaded(module: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a parameter, on the meta device, as it was before its module was first loaded."""
    weight: torch.Tensor = get_layerwise_info(module).restore_metadata[0][name]
    return weight


def unfollowing(model: torch.nn.Module) -> list[str]:
    """Find the names of buffers that would keep old weights.

    These buffers were views of a parameter when the model was built. If the processing after
    loading moved the parameter, writes to the parameter no longer reach the buffers.
    """
    found = []
    for prefix, module in model.named_modules():
        captured = get_layerwise_info(module).restore_metadata[1]
        memory = {
            weight.untyped_storage().data_ptr()
            for weight in module.parameters()
            if not isinstance(weight, Sealed)
        }
        for name in module._non_persistent_buffers_set - captured.keys() - SKIP_TENSORS:
            buffer = module._buffers[name]
            if buffer is not None and buffer.untyped_storage().data_ptr() not in memory:
                found.append(f"{prefix}.{name}")
    return sorted(found)


def pack_tied(model: torch.nn.Module) -> None:
    """Repeat the processing that follows loading, for modules that share a parameter.

    vLLM loads only one of these modules.
    """
    owners: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        weights = [*module.parameters(recurse=False)]
        if any(isinstance(weight, Sealed) for weight in weights):
            continue  # paged experts, which share the router's bias, are packed in the store
        for weight in weights:
            owners.setdefault(id(weight), []).append(module)
    for modules in owners.values():
        for module in modules if len(modules) > 1 else ():
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)


def weights_of(config: Any, model: torch.nn.Module, path: str | None) -> Iterator[Any]:
    """Iterate over names and tensors of a checkpoint; by default, of the model's own."""
    model_config = config.model_config
    if path is not None:
        model_config = copy.copy(model_config)  # a failed update must not rename the model
        model_config.model, model_config.model_weights = path, ""
        model_config.revision = None
    loader = get_model_loader(config.load_config)
    weights: Iterator[Any] = loader.get_all_weights(model_config, model)
    return weights


__all__ = [
    "exempt",
    "finalize_layerwise_reload",
    "initialize_layerwise_reload",
    "pack_tied",
    "readmit",
    "set_current_vllm_config",
    "unfollowing",
    "unloaded",
    "weights_of",
]
