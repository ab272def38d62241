"""The state of a model's modules, which is restored if a change fails."""

from __future__ import annotations

from collections.abc import Collection

import torch


class ModelState:
    """A copy of all attributes of a model's modules, and of the values of their tensors.

    Loading replaces tensors, writes into tensors, and sets attributes, such as packed weights.

    Args:
        model: The model.
        absent: Parameters whose values need not be restored.
    """

    def __init__(self, model: torch.nn.Module, absent: Collection[torch.nn.Parameter]) -> None:
        self._modules = []
        tensors: dict[int, torch.Tensor] = {}
        for module in model.modules():
            state = vars(module)
            own = {name: state[name].copy() for name in ("_parameters", "_buffers", "_modules",
                   "_non_persistent_buffers_set")}  # fmt: skip
            self._modules.append((module, {**state, **own}))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensors[id(tensor)] = tensor
        for weight in absent:
            tensors.pop(id(weight), None)
        self._values = [(each, each.data, each.detach().clone()) for each in tensors.values()]

    def restore(self) -> None:
        """Undo all changes made since the copy."""
        for module, state in self._modules:
            vars(module).clear()
            vars(module).update(state)
        for tensor, memory, value in self._values:
            tensor.data = memory
            memory.copy_(value)
