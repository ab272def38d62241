"""Recording of a Hugging Face model's routing, with weights and predictions, for traces."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TypeAlias

import torch

from fluxmoe import arguments
from fluxmoe.backends import op
from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.torch import experts, layout
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.backends.torch.twin import has_own_methods
from fluxmoe.core.types import Phase
from fluxmoe.errors import UnsupportedError
from fluxmoe.inventory import TOP_K
from fluxmoe.trace import TraceMeta
from fluxmoe.trace.recorder import Recorder

_WHERE = "PagedModel.record"
#: Remedy if the configured prefetch policy needs predictions that a model cannot make.
OTHER_POLICY = "choose another prefetch policy"


#: For each expert layer, the function that notes more than expert ids; None if ids are enough.
Notes: TypeAlias = list[experts.Note | None]


def begin(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    runtime: Runtime,
    handle: int,
    lock: ForwardLock,
    path: str | PathLike[str],
    *,
    weights: bool,
    predict: bool,
    max_steps: int | None,
    phase: Phase | None,
    replace: bool,
) -> tuple[Recorder, Notes]:
    """Check the arguments of ``PagedModel.record``, and make a recorder and the layers' notes.

    Raises:
        TraceError, ConfigError, UnsupportedError: See ``PagedModel.record``.
    """
    if phase is not None:
        arguments.instance(phase, Phase, "phase", where=_WHERE)
    if max_steps is not None:
        arguments.whole(max_steps, "max_steps", where=_WHERE)
    file = arguments.path(path, "path", where=_WHERE)
    columns = {"weights": weights, "predicted": predict}
    needed = predict or runtime.pager.predictions
    found = notes(model, layers, handle, lock.turn, weights=weights, predict=needed)
    recorder = Recorder(
        file,
        meta(model, layers[0], runtime),
        columns=[name for name, wanted in columns.items() if wanted],
        replace=replace,
        max_steps=max_steps,
        phase=phase,
        rows=lock.rows,
    )
    return recorder, found


def notes(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    handle: int,
    turn: torch.Tensor,
    *,
    weights: bool = False,
    predict: bool,
) -> Notes:
    """Make, for each expert layer, a function that notes weights and predictions.

    All entries are None if neither weights nor predictions are wanted.

    Args:
        model: The model.
        layers: Its expert layers, in order.
        handle: Handle of their pager.
        turn: The model's turn (``backends.op``).
        weights: Note the routing weights.
        predict: Note the experts that the next layer's router chooses for this layer's hidden
            states.

    Raises:
        UnsupportedError: ``predict`` is set, but a layer's router was not found.
    """
    if not weights and not predict:
        return [None] * len(layers)
    routers = routers_of(model, layers, "record without --predict") if predict else []
    following = [*routers[1:], None] if predict else [None] * len(layers)
    return [_note(handle, turn, weights, predict, router) for router in following]


def show(
    handle: int, layers: Sequence[torch.nn.Module], recorder: Recorder | None, notes: Notes
) -> None:
    """Pass a pager's events and its layers' notes to ``recorder``, or to none if it is None."""
    op.record(handle, recorder)
    for layer, note in zip(layers, notes, strict=True):
        experts.set_note(layer, note)


def _note(
    handle: int,
    turn: torch.Tensor,
    weights: bool,
    predict: bool,
    router: torch.nn.Module | None,
) -> experts.Note:
    def note(ids: torch.Tensor, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        predicted = None
        if router is not None and not router.training:  # a router may draw noise in training
            # This call bypasses the router's hooks, which may collect outputs for its own layer.
            predicted = type(router).forward(router, hidden)[-1]
        elif predict:
            predicted = ids[:, :0]
        # Another use of the weights could change how a compiler fuses their computation.
        noted = weights and not torch.compiler.is_compiling()
        return op.note(ids, scores if noted else None, predicted, handle, turn)

    return note


def routers_of(
    model: torch.nn.Module, layers: Sequence[torch.nn.Module], fix: str
) -> list[torch.nn.Module]:
    """Find each expert layer's router: a sibling module whose last result is the expert ids.

    Raises:
        UnsupportedError: A layer has no such module; ``fix`` is the remedy.
    """
    block_of = {id(child): module for module in model.modules() for child in module.children()}
    routers = []
    for layer in layers:
        block = block_of[id(layer)]
        router = getattr(block, "gate", None)
        if not isinstance(router, torch.nn.Module) or not _routes(router, layer):
            raise UnsupportedError(
                f"{type(block).__name__} has no router `gate` of transformers that returns expert "
                "ids, so the next layer's experts cannot be predicted",
                fix=fix,
            )
        routers.append(router)
    return routers


def _routes(router: torch.nn.Module, layer: torch.nn.Module) -> bool:
    weight = getattr(router, "weight", None)
    # A user's router could have a state or draw random numbers, so it must not run ahead.
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not has_own_methods(router):
        return False
    probe = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            answer = type(router).forward(router, probe)
    except (RuntimeError, TypeError, ValueError):
        return False
    ids = answer[-1] if isinstance(answer, tuple) else None
    return isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point()


def meta(model: torch.nn.Module, layer: torch.nn.Module, runtime: Runtime) -> TraceMeta:
    """Return the metadata for traces of a model. Raises UnsupportedError if top_k is unknown."""
    top_k = layout.top_k_of(layer)
    if top_k is None:
        raise UnsupportedError(
            f"{type(layer.config).__name__} has none of {', '.join(TOP_K)}, so no trace can "
            "be recorded"
        )
    return runtime.trace_meta(model=layout.name_of(model, layer), top_k=top_k, source="torch")
