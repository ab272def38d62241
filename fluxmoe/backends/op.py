"""``fluxmoe::acquire``: the operator through which compiled and eager models call the pager.

If a bank may have fewer slots than a layer has experts, the layer runs in waves, and
``fluxmoe::compute`` replaces the kernel. Like the kernel, this operator fills an output; it also
acquires the experts.

If a trace or a prefetch policy needs more than the expert ids, ``fluxmoe::note`` runs before
``acquire`` or ``compute``.

``acquire`` is opaque to ``torch.compile``. It takes the routed expert ids and returns slots, so the
kernel that follows depends on ``acquire`` and cannot be moved before it. ``acquire`` is declared
functional, because declaring a mutated input would change the fusion around the router, and thus
the output of some models (docs/project/adr/0001).

An ``acquire`` must not run before the kernel that follows the previous ``acquire`` has read the
arenas. Normally, each layer of a pass depends on the previous layer. Where this is not guaranteed,
a dummy tensor, the *turn*, makes a compiler keep the order: each ``acquire`` takes the turn as an
argument, and ``fluxmoe::done``, which runs after each kernel, takes the kernel's result and is
declared to mutate the turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch.library import Library, register_fake

from fluxmoe.core.paging.event import Slots
from fluxmoe.core.paging.pager import Compute, EventWatcher
from fluxmoe.core.types import Int64s, Ints
from fluxmoe.trace.recorder import Recorder


class Pager(Protocol):
    """The part of ``ExpertPager`` that the operator uses."""

    watcher: EventWatcher | None

    def acquire(self, layer: int, ids: Ints, slots: Slots) -> object: ...

    def run(self, layer: int, ids: Ints, slots: Slots, compute: Compute) -> None: ...

    def predict(self, experts: Ints) -> None: ...


#: A kernel on a layer's arenas: fills the first argument, the output of some tokens, given the
#: tokens' hidden states, routing weights, experts and slots.
SlotKernel: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None
]

#: Predicts a layer's experts, integers ``[tokens, any]``, from hidden states ``[tokens, hidden]``.
Router: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

# A traced operator cannot take arbitrary objects, so it refers to pagers and recorders by number.
_pagers: dict[int, Pager] = {}
_recorders: dict[int, Recorder] = {}
_kernels: dict[int, dict[int, SlotKernel]] = {}
_routers: dict[int, dict[int, Router]] = {}


def attach(pager: Pager) -> int:
    """Register a pager with the operator, and return its handle, the lowest free number."""
    handle = next(i for i in range(len(_pagers) + 1) if i not in _pagers)
    _pagers[handle] = pager
    return handle


def detach(handle: int) -> None:
    """Remove a pager, its kernels and its recorder. Idempotent."""
    _pagers.pop(handle, None)
    _recorders.pop(handle, None)
    _kernels.pop(handle, None)
    _routers.pop(handle, None)


def use_kernel(handle: int, layer: int, kernel: SlotKernel) -> None:
    """Make ``compute`` use a kernel for a layer, until the pager is detached."""
    _kernels.setdefault(handle, {})[layer] = kernel


def use_router(handle: int, layer: int, router: Router) -> None:
    """Make ``predict`` use a router for a layer, until the pager is detached."""
    _routers.setdefault(handle, {})[layer] = router


def record(handle: int, recorder: Recorder | None) -> None:
    """Pass a pager's events to ``recorder`` from now on, or to no recorder if it is None."""
    if recorder is None:
        _recorders.pop(handle, None)
        _pagers[handle].watcher = None
    else:
        _recorders[handle] = recorder
        _pagers[handle].watcher = recorder.observe


def _acquire(
    topk_ids: torch.Tensor, handle: int, layer: int, turn: torch.Tensor | None = None
) -> torch.Tensor:
    # The slots must be contiguous even if the ids are not; otherwise the pager would fill a copy.
    slots = torch.empty_like(topk_ids, dtype=torch.int32, memory_format=torch.contiguous_format)
    # numpy's reshape is cheaper than torch's, and does not copy contiguous arrays.
    _pagers[handle].acquire(layer, topk_ids.numpy().reshape(-1), slots.numpy().reshape(-1))
    return slots


def _fake(
    topk_ids: torch.Tensor, handle: int, layer: int, turn: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)


def _compute(
    out: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    handle: int,
    layer: int,
) -> None:
    kernel, ids = _kernels[handle][layer], ids.contiguous()
    slots = torch.empty_like(ids, dtype=torch.int32)

    def compute(tokens: Int64s | None) -> None:
        if tokens is None:
            kernel(out, x, weights, ids, slots)
            return
        some = torch.from_numpy(tokens)
        part = torch.empty_like(out[some])
        kernel(part, x[some], weights[some], ids[some], slots[some])
        out[some] = part

    _pagers[handle].run(layer, ids.numpy(), slots.numpy(), compute)


def _predict(topk_ids: torch.Tensor, x: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    return _note(topk_ids, None, _routers[handle][layer](x), handle)


def _note(
    topk_ids: torch.Tensor,
    weights: torch.Tensor | None,
    predicted: torch.Tensor | None,
    handle: int,
    turn: torch.Tensor | None = None,
) -> torch.Tensor:
    if predicted is not None:
        _pagers[handle].predict(predicted.numpy().reshape(-1))
    recorder = _recorders.get(handle)
    if recorder is not None:
        recorder.note(
            None if weights is None else weights.to(torch.float16, copy=True).numpy(),
            None if predicted is None else predicted.to(torch.int16, copy=True).numpy(),
        )
    return topk_ids.clone()


def _fake_note(
    topk_ids: torch.Tensor,
    weights: torch.Tensor | None,
    predicted: torch.Tensor | None,
    handle: int,
    turn: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(topk_ids)


_library = Library("fluxmoe", "FRAGMENT")
_library.define("acquire(Tensor topk_ids, int handle, int layer, Tensor? turn=None) -> Tensor")
_library.impl("acquire", _acquire, "CPU")
register_fake("fluxmoe::acquire", _fake, lib=_library)


def acquire(
    topk_ids: torch.Tensor, handle: int, layer: int, turn: torch.Tensor | None = None
) -> torch.Tensor:
    """Make the routed experts resident.

    Args:
        topk_ids: Routed experts of an MoE layer, integers of any shape; negative ids are padding.
        handle: Handle of the pager, from ``attach``.
        layer: Index of the MoE layer, from 0.
        turn: The model's turn, uint8 ``[1]``; None if each layer of a compiled graph depends on the
            previous layer.

    Returns:
        The slot of each expert, int32 of the same shape.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fluxmoe.acquire(topk_ids, handle, layer, turn)
    return _acquire(topk_ids, handle, layer)  # dispatching the operator costs more than the call


_library.define("done(Tensor out, Tensor(a!) turn) -> ()")
_library.impl("done", lambda out, turn: None, "CPU")
register_fake("fluxmoe::done", lambda out, turn: None, lib=_library)

done = torch.ops.fluxmoe.done

_library.define(
    "compute(Tensor(a!) out, Tensor x, Tensor weights, Tensor ids, int handle, int layer) -> ()"
)
_library.impl("compute", _compute, "CPU")
register_fake("fluxmoe::compute", lambda *_: None, lib=_library)


def compute(
    out: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    handle: int,
    layer: int,
) -> None:
    """Compute a layer, in waves of tokens if its bank has too few slots for all routed experts.

    Args:
        out: Filled with the output of the layer; ``[tokens, hidden]``, with the dtype of ``x``.
        x: Hidden states, ``[tokens, hidden]``.
        weights: Routing weights, ``[tokens, top_k]``.
        ids: Routed experts, integers ``[tokens, top_k]``; negative ids are padding.
        handle: Handle of the pager, from ``attach``.
        layer: Index of the MoE layer, from 0, for which ``use_kernel`` has set a kernel.
    """
    if torch.compiler.is_compiling():
        torch.ops.fluxmoe.compute(out, x, weights, ids, handle, layer)
    else:
        _compute(out, x, weights, ids, handle, layer)


# ``note`` returns a copy of the ids for the next operator, because a compiler removes operators
# whose results are unused.
_library.define(
    "note(Tensor topk_ids, Tensor? weights, Tensor? predicted, int handle, Tensor? turn=None)"
    " -> Tensor"
)
_library.impl("note", _note, "CPU")
register_fake("fluxmoe::note", _fake_note, lib=_library)

note = torch.ops.fluxmoe.note

# The router runs within the operator, so that it cannot change how the model is compiled.
_library.define("predict(Tensor topk_ids, Tensor x, int handle, int layer) -> Tensor")
_library.impl("predict", _predict, "CPU")
register_fake("fluxmoe::predict", lambda topk_ids, *_: torch.empty_like(topk_ids), lib=_library)

predict = torch.ops.fluxmoe.predict
