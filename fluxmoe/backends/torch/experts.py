"""The experts implementation ``fluxmoe``: make pages resident, then run the stock code on slots.

``transformers`` lets each experts module select its implementation at run time. The function
registered here gets slots from the pager and calls the previous implementation with a *twin* of the
module: same class and settings, but with arenas as weights. The numbering of the twin's experts
depends on the implementation:

* ``grouped_mm`` and ``batched_mm`` treat all experts alike, so the twin's experts are the slots.
  Groups of tokens are in a different order than in the stock code, but each has the same rows in
  the same order, and the sum over a token's experts runs in the router's order.
* ``eager`` adds up the experts' contributions in ascending order of expert id. The twin keeps
  the logical ids, and its weights look up the slot in the expert table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from fluxmoe.backends import op
from fluxmoe.backends.torch.layout import weights_of
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.backends.torch.names import NAMES
from fluxmoe.backends.torch.refusals import require_no_export, require_plain
from fluxmoe.backends.torch.weights.sealed import FixedParameters, Gone, Sealed, seal
from fluxmoe.errors import UnsupportedError

NAMES.require("experts")  # an ImportError from the lines below would give no remedy

from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

NAME = "fluxmoe"
EAGER = "eager"

Compute: TypeAlias = Callable[
    [torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]

#: Arena of a part, ``[slots, …]``, with the shape and dtype of its weights.
Arenas: TypeAlias = dict[str, torch.Tensor]

#: Implementations that can compute on slots.
BY_SLOT: dict[str, Compute] = {
    "grouped_mm": grouped_mm_experts_forward,
    "batched_mm": batched_mm_experts_forward,
}
IMPLEMENTATIONS = (EAGER, *BY_SLOT)

#: Called with a layer's (expert ids, routing weights, hidden states); returns the ids.
Note: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# grouped_mm counts the tokens per expert with a float32 histogram that is exact up to 4097 bins. No
# model has that many experts, but a bank may have that many slots.
GROUPED_MM_SLOTS = 4096


class Lease:
    """Token held by each reader of the arenas, which are released with the last holder."""


@dataclass(eq=False)
class Binding:
    """State that a paged experts module needs to run, and to be restored.

    Attributes:
        handle: The pager (``op.attach``).
        layer: Index of the MoE layer, from 0.
        twin: The module passed to the computing implementation.
        compute: That implementation, by slot; None for ``eager``.
        kinds: Class of each of the module's own parameters, which are sealed.
        lock: Lock against changes of the arenas from ``acquire`` to the kernel's end.
        lease: Keeps the arenas alive.
        note: Passes more than expert ids to a recorder; None if not needed.
    """

    handle: int
    layer: int
    twin: torch.nn.Module
    compute: Compute | None
    kinds: list[type[torch.nn.Parameter]]
    lock: ForwardLock
    lease: Lease
    note: Note | None = None


class ByExpert:
    """Weights of a layer's experts, read from the arena through the layer's expert table."""

    def __init__(self, arena: torch.Tensor, table: torch.Tensor) -> None:
        self.arena, self._table = arena, table

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        return self.arena[self._table[expert]]


def bind(
    module: torch.nn.Module,
    handle: int,
    layer: int,
    implementation: str,
    arenas: Arenas,
    table: torch.Tensor,
    lock: ForwardLock,
    lease: Lease,
) -> None:
    """Remove the experts from a module and make it compute on arenas.

    Args:
        module: An experts module.
        handle: The pager.
        layer: Index of the MoE layer, from 0.
        implementation: Computing implementation, one of ``IMPLEMENTATIONS``.
        arenas: Part → ``[slots, …]`` of the layer's bank.
        table: The layer's expert table, ``[experts]`` → slot.
        lock: Lock of the model.
        lease: Keeps the arenas alive.
    """
    weights = weights_of(module)
    twin = copy.copy(module)
    twin._parameters = {}
    if implementation == EAGER:
        for part, arena in arenas.items():
            setattr(twin, part, ByExpert(arena, table))
    compute = BY_SLOT.get(implementation)
    kinds = [seal(weight, Sealed) for weight in weights.values()]
    module._parameters = FixedParameters(module._parameters)
    module._fluxmoe = Binding(handle, layer, twin, compute, kinds, lock, lease)
    resize(module, arenas)


def resize(module: torch.nn.Module, arenas: Arenas) -> None:
    """Update a paged module after its bank's number of slots has changed."""
    twin = module._fluxmoe.twin
    for part, arena in arenas.items():
        if module._fluxmoe.compute is None:
            getattr(twin, part).arena = arena
        else:
            setattr(twin, part, torch.nn.Parameter(arena, requires_grad=False))
            twin.num_experts = len(arena)


def absent(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """Make a placeholder for a weight in the store, with the same shape but without memory."""
    return torch.nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)


def is_bound(module: torch.nn.Module) -> bool:
    """True if a module's experts are paged."""
    return hasattr(module, "_fluxmoe")


def set_note(module: torch.nn.Module, note: Note | None) -> None:
    """Set the function that passes more than expert ids to a recorder."""
    module._fluxmoe.note = note


def release(module: torch.nn.Module, *, gone: bool) -> None:
    """Restore a module's own parameters; ``gone``: they have no values."""
    module._parameters = dict(module._parameters)
    kinds = module._fluxmoe.kinds
    for weight, kind in zip(weights_of(module).values(), kinds, strict=True):
        seal(weight, Gone if gone else kind)
    del module._fluxmoe


def forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute one MoE layer's experts, with the signature of ``transformers``."""
    binding: Binding | None = getattr(self, "_fluxmoe", None)
    if binding is None:
        raise UnsupportedError(
            f"a {type(self).__name__} that is not paged uses the paging implementation",
            fix="page the model with fluxmoe.page(), and do not share its config object with "
            "another model",
        )
    learns = [hidden_states, top_k_weights]
    if torch.compiler.is_compiling():
        require_no_export()
    else:
        require_plain(hidden_states, top_k_index, top_k_weights)
        learns += [self.gate_up_proj, self.down_proj]  # a compiler would look into them
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learns):
        # The arenas would be overwritten before a backward pass could read them.
        raise UnsupportedError(
            "a paged model cannot compute gradients", fix="call it under torch.no_grad()"
        )
    if torch.compiler.is_compiling():  # a lock would break the graph
        return _event(self, binding, hidden_states, top_k_index, top_k_weights)
    event = partial(_event, self, binding, hidden_states, top_k_index, top_k_weights)
    return binding.lock.alone(event)


def _event(
    module: torch.nn.Module,
    binding: Binding,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    if getattr(module, "_fluxmoe", None) is not binding:
        # Closed while this thread was waiting: its handle may belong to another pager now.
        return type(module).forward(module, hidden_states, top_k_index, top_k_weights)
    if binding.note is not None:
        top_k_index = binding.note(top_k_index, top_k_weights, hidden_states)
    slots = op.acquire(top_k_index, binding.handle, binding.layer)
    if binding.compute is None:
        stock: Compute = type(module).forward.__wrapped__
        return stock(binding.twin, hidden_states, top_k_index, top_k_weights)
    slots = slots.to(top_k_index.dtype)
    return binding.compute(binding.twin, hidden_states, slots, top_k_weights)


def register() -> None:
    """Register the implementation with ``transformers``. Idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
