"""vLLM's calls that change or read weights: loading uses ``WeightDoor``, others are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fluxmoe.backends.vllm.worker.layer import RELOAD, PagedRoutedExperts
from fluxmoe.backends.vllm.worker.weights.door import WeightDoor
from fluxmoe.backends.vllm.worker.weights.streamed import PARTS
from fluxmoe.errors import UnsupportedError

_STOCK = "use a stock engine for this call"

#: Methods of vLLM's worker that read or write the model's weights → remedy. They are refused,
#: because the parameters of experts have no data.
WEIGHT_CALLS = {
    "reset_weights": RELOAD,
    "save_sharded_state": _STOCK,
    "save_tensorized_model": _STOCK,
    "compute_weight_checksums": _STOCK,
    "init_weight_transfer_engine": RELOAD,
    "start_weight_update": RELOAD,
    "start_draft_weight_update": RELOAD,
    "update_weights": RELOAD,
    "finish_weight_update": RELOAD,
}


def refusing(call: str, fix: str = RELOAD) -> Callable[..., None]:
    """Make a replacement for the function or method ``call`` that raises an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise UnsupportedError(
            f"{call} is not supported for a model whose experts are paged", fix=fix
        )

    return refuse


def guard_loading(model: Any, door: WeightDoor) -> None:
    """Route ``load_weights`` of a model through ``door``, and guard the loaders of its parts.

    Outside an update, these loaders are refused: they would write into slots instead of the page
    store, and thus mix old and new experts. The loaders of experts' parameters are always refused.

    Args:
        model: vLLM's model, already paged.
        door: The model's door.
    """
    for module in model.modules():
        if hasattr(module, "load_weights"):
            inner = _inside(door, module.load_weights, "load_weights of a part of the model")
            module.load_weights = door.update if module is model else inner
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(module, PagedRoutedExperts) and name in PARTS:
                weight.weight_loader = refusing("weight_loader")
            elif hasattr(weight, "weight_loader"):
                weight.weight_loader = _inside(door, weight.weight_loader, "weight_loader")


def _inside(door: WeightDoor, load: Callable[..., Any], call: str) -> Callable[..., Any]:
    """Make a replacement for ``load`` that raises an error outside an update."""

    @wraps(load)
    def guarded(*args: object, **kwargs: object) -> Any:
        return load(*args, **kwargs) if door.open else refusing(call)()

    return guarded
