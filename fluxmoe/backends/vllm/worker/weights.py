"""Refusal of direct access to a model's weights while its experts are paged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluxmoe.errors import UnsupportedError

#: Methods of vLLM's worker that read or write the model's weights in place. After loading, those of
#: the experts are slots, whose pages change.
WEIGHT_CALLS = (
    "reload_weights",
    "reset_weights",
    "save_sharded_state",
    "save_tensorized_model",
    "compute_weight_checksums",
)


def refusing(call: str) -> Callable[..., None]:
    """A replacement for the function or method ``call`` that refuses it."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise UnsupportedError(
            f"{call} is not supported for a model whose experts are paged",
            fix="use a stock engine for it; restart a server to give it new weights",
        )

    return refuse


def refuse_loading(model: Any) -> None:
    """Refuse ``load_weights`` of a model and of its modules, and the loaders of its experts.

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
