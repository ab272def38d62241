"""Calls of vLLM's worker that cannot be answered while experts are paged."""

from __future__ import annotations

from collections.abc import Callable

from fluxmoe.errors import UnsupportedError

#: Methods of vLLM's worker that read or write the model's weights where they lie. After loading,
#: those of the experts are slots, which hold now one page and now another.
WEIGHT_CALLS = (
    "reload_weights",
    "reset_weights",
    "save_sharded_state",
    "save_tensorized_model",
    "compute_weight_checksums",
)


def refusing(call: str) -> Callable[..., None]:
    """A method that stands for ``call`` and refuses it."""

    def refuse(worker: object, *args: object, **kwargs: object) -> None:
        raise UnsupportedError(
            f"{call} is not supported for a model whose experts are paged",
            fix="start a stock engine for it; a server with new weights must be started anew",
        )

    return refuse
