"""Rejection of direct access to a model's weights while its experts are paged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluxmoe.errors import UnsupportedError

#: Methods of vLLM's worker that read or write the model's weights in place. After loading, expert
#: weights are slots, whose pages change.
WEIGHT_CALLS = (
    "reload_weights",
    "reset_weights",
    "save_sharded_state",
    "save_tensorized_model",
    "compute_weight_checksums",
)


def refusing(call: str) -> Callable[..., None]:
    """Make a replacement for the function or method ``call`` that raises an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise UnsupportedError(
            f"{call} is not supported for a model whose experts are paged",
            fix="use a stock engine for it, or restart the server to change its weights",
        )

    return refuse


def refuse_loading(model: Any) -> None:
    """Disable ``load_weights`` of a model and of its modules, and the loaders of its experts.

    They would write into slots and not into the page store, mixing old and new experts.

    Args:
        model: vLLM's model, already paged.
    """
    for module in model.modules():
        if hasattr(module, "load_weights"):
            module.load_weights = refusing("load_weights")
        for weight in module.parameters(recurse=False):
            if hasattr(weight, "weight_loader"):
                weight.weight_loader = refusing("weight_loader")
