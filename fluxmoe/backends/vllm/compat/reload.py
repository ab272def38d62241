"""vLLM's loading of weights into a model that runs.

vLLM restores each module to its state before it was first loaded (on the meta device), loads it,
repeats what followed loading (on a CPU: packing), and copies the result into the module's tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from fluxmoe.backends.sealed import Sealed
from fluxmoe.backends.vllm.names import NAMES

NAMES.require("reload")  # an ImportError from the lines below would give no remedy

from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS


def exempt(module: torch.nn.Module) -> None:
    """Let ``initialize_layerwise_reload`` skip a module, until ``readmit``."""
    get_layerwise_info(module).load_numel_total = 0


def readmit(module: torch.nn.Module) -> None:
    """Forget that a module was exempt or is being loaded."""
    get_layerwise_info(module).reset()


def unloaded(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter of a module as it was before it was first loaded, on the meta device."""
    weight: torch.Tensor = get_layerwise_info(module).restore_metadata[0][name]
    return weight


def unfollowing(model: torch.nn.Module) -> list[str]:
    """Names of buffers that would keep old weights.

    They were views of a parameter when the model was built. If what followed loading gave the
    parameter other memory, they are not written with it any more.
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
    """Repeat what follows loading for modules that share a parameter, of which vLLM loads one."""
    owners: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            owners.setdefault(id(weight), []).append(module)
    for modules in owners.values():
        for module in modules if len(modules) > 1 else ():
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)


def weights_of(config: Any, model: torch.nn.Module, path: str | None) -> Iterator[Any]:
    """Iterate over the tensors of the checkpoint ``path`` (None: the model's own) by name."""
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
