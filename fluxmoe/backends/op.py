"""``fluxmoe::acquire``: the operator through which compiled and eager models call the pager.

While a trace that contains more than the expert ids is recorded, ``fluxmoe::note`` runs before the
operator.

The operator is opaque to ``torch.compile``: it takes the routed expert ids and returns slots, so
the kernel that follows depends on the operator and cannot be moved before it. The operator is
declared functional, because declaring a mutated input would change the fusion around the router,
and thus the output of some models (docs/project/adr/0001).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.library import Library, register_fake

from fluxmoe.core.paging.event import Slots
from fluxmoe.core.paging.pager import EventWatcher
from fluxmoe.core.types import Ints
from fluxmoe.trace.recorder import Recorder


class Pager(Protocol):
    """The part of ``ExpertPager`` that the operator uses."""

    watcher: EventWatcher | None

    def acquire(self, layer: int, ids: Ints, slots: Slots) -> None: ...


# A traced operator can only carry numbers, so it refers to pagers and recorders by number.
_pagers: dict[int, Pager] = {}
_recorders: dict[int, Recorder] = {}


def attach(pager: Pager) -> int:
    """Make a pager reachable from the operator; return the pager's handle, the lowest free one."""
    handle = next(i for i in range(len(_pagers) + 1) if i not in _pagers)
    _pagers[handle] = pager
    return handle


def detach(handle: int) -> None:
    """Remove a pager and its recorder. Idempotent."""
    _pagers.pop(handle, None)
    _recorders.pop(handle, None)


def record(handle: int, recorder: Recorder | None) -> None:
    """Pass a pager's events to ``recorder`` from now on, or to no recorder if it is None."""
    if recorder is None:
        _recorders.pop(handle, None)
        _pagers[handle].watcher = None
    else:
        _recorders[handle] = recorder
        _pagers[handle].watcher = recorder.observe


def _acquire(topk_ids: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    # The slots must be contiguous even if the ids are not; otherwise the pager would fill a copy.
    slots = torch.empty_like(topk_ids, dtype=torch.int32, memory_format=torch.contiguous_format)
    # numpy's reshape is cheaper than torch's, and does not copy contiguous arrays.
    _pagers[handle].acquire(layer, topk_ids.numpy().reshape(-1), slots.numpy().reshape(-1))
    return slots


def _fake(topk_ids: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    return torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)


def _note(
    topk_ids: torch.Tensor,
    weights: torch.Tensor | None,
    predicted: torch.Tensor | None,
    handle: int,
) -> torch.Tensor:
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
) -> torch.Tensor:
    return torch.empty_like(topk_ids)


_library = Library("fluxmoe", "FRAGMENT")
_library.define("acquire(Tensor topk_ids, int handle, int layer) -> Tensor")
_library.impl("acquire", _acquire, "CPU")
register_fake("fluxmoe::acquire", _fake, lib=_library)


def acquire(topk_ids: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    """Make the routed experts resident.

    Args:
        topk_ids: Routed experts of an MoE layer, integers of any shape; negative ids are padding.
        handle: Handle of the pager, from ``attach``.
        layer: Index of the MoE layer, from 0.

    Returns:
        The slot of each expert, int32 of the same shape.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fluxmoe.acquire(topk_ids, handle, layer)
    return _acquire(topk_ids, handle, layer)  # dispatching the operator costs more than the call


# The operator returns a copy of the ids, which ``acquire`` takes, because a compiler removes
# operators whose results are unused.
_library.define("note(Tensor topk_ids, Tensor? weights, Tensor? predicted, int handle) -> Tensor")
_library.impl("note", _note, "CPU")
register_fake("fluxmoe::note", _fake_note, lib=_library)

note = torch.ops.fluxmoe.note
