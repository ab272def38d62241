"""The experts implementation ``fluxmoe``: make pages resident, then run the stock code on slots.

``transformers`` lets each experts module select its implementation at run time. The function
registered here gets slots from the pager and calls the previous implementation with a *twin* of the
module, which has the same class and settings, but arenas as weights. The numbering of the twin's
experts depends on the implementation:

* ``grouped_mm`` and ``batched_mm`` treat all experts alike, so the twin's experts are the slots.
  The groups of tokens are ordered differently from the stock code's, but each group has the same
  rows in the same order, and the sum over a token's experts runs in the router's order.
* ``eager`` adds up the experts' contributions in ascending order of expert id. The twin keeps
  the logical ids, and its weights look up the slot in the expert table.

If a bank may have fewer slots than a layer has experts, the operator ``op.compute`` calls the twin
for each wave of tokens. The twin then has a separate expert table with the slots of the wave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from fluxmoe.backends import op
from fluxmoe.backends.sealed import FixedParameters, seal
from fluxmoe.backends.selfcheck import Checked, Parts, require_slot_independence
from fluxmoe.backends.torch.layout import top_k_of, weights_of
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.backends.torch.names import NAMES
from fluxmoe.backends.torch.refusals import require_no_export, require_plain
from fluxmoe.backends.torch.twin import (
    CUSTOM,
    IMPLEMENTATIONS,
    Arenas,
    Inside,
    Twin,
    is_plain,
)
from fluxmoe.backends.torch.weights.sealed import CLOSE, Gone, Paged
from fluxmoe.errors import UnsupportedError

NAMES.require("experts")  # the imports below would raise an error without a remedy

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "fluxmoe"

#: A function of a layer's expert ids, routing weights and hidden states that returns the ids.
Note: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# grouped_mm counts the tokens per expert with a float32 histogram that is exact up to 4097 bins. No
# model has that many experts, but a bank may have that many slots.
GROUPED_MM_SLOTS = 4096


class Lease:
    """An object held by each reader of the arenas, which are freed when no reader holds it."""


@dataclass(eq=False)
class Binding:
    """The state with which a paged experts module runs, and from which it is restored.

    Attributes:
        handle: Handle of the pager, from ``op.attach``.
        layer: Index of the MoE layer, from 0.
        twin: The copy of the module that computes on the arenas.
        kinds: Class of each of the module's own parameters before it was sealed.
        lock: Lock that prevents changes to the arenas from ``acquire`` to the end of the kernel.
        lease: Object that keeps the arenas alive.
        waves: True if the layer may run in waves.
        inside: The code inside the experts, which must not change after the check; None if the twin
            runs the code exactly as the module would.
        note: Function that passes more than expert ids to a recorder; None if ids are enough.
    """

    handle: int
    layer: int
    twin: Twin
    kinds: list[type[torch.nn.Parameter]]
    lock: ForwardLock
    lease: Lease
    waves: bool
    inside: Inside | None
    note: Note | None = None


def bind(
    module: torch.nn.Module,
    handle: int,
    layer: int,
    implementation: str,
    arenas: Arenas,
    table: torch.Tensor,
    lock: ForwardLock,
    lease: Lease,
    *,
    waves: bool = False,
) -> None:
    """Make a module compute on arenas, and seal its own weights.

    Args:
        module: An experts module.
        handle: Handle of the pager.
        layer: Index of the MoE layer, from 0.
        implementation: Computing implementation, one of ``IMPLEMENTATIONS``.
        arenas: Part → arena ``[slots, …]`` of the layer's bank.
        table: The layer's expert table, ``[experts]`` → slot.
        lock: Lock of the model.
        lease: Object that keeps the arenas alive.
        waves: True if the bank may have fewer slots than the layer has experts.
    """
    if waves:
        table = torch.zeros_like(table)
    twin = Twin(module, implementation, arenas, table, lock.turn)
    kinds = [seal(weight, Paged) for weight in weights_of(module).values()]
    module._parameters = FixedParameters(module._parameters, CLOSE)
    inside = Inside(module) if waves or implementation == "grouped_mm" else None
    module._fluxmoe = Binding(handle, layer, twin, kinds, lock, lease, waves, inside)
    if waves:
        op.use_kernel(handle, layer, partial(_on_slots, twin, table))


def _on_slots(
    twin: Twin,
    table: torch.Tensor,
    out: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Compute some tokens of a layer, after writing their slots to the twin's expert table."""
    table[ids.long()] = slots
    out.copy_(twin(x, ids, slots, weights))


def resize(module: torch.nn.Module, arenas: Arenas) -> None:
    """Give a paged module new arenas after the number of slots in its bank has changed."""
    module._fluxmoe.twin.resize(arenas)


def absent(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """Make a placeholder for a weight in the store, with the same shape but without memory."""
    return torch.nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)


def is_bound(module: torch.nn.Module) -> bool:
    """Return True if a module's experts are paged."""
    return hasattr(module, "_fluxmoe")


def set_note(module: torch.nn.Module, note: Note | None) -> None:
    """Set the function that passes more than expert ids to a recorder."""
    module._fluxmoe.note = note


def release(module: torch.nn.Module, *, gone: bool) -> None:
    """Restore a module's original parameters, sealed as ``Gone`` if ``gone``. Idempotent."""
    if not is_bound(module):
        return
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
        if binding.inside is not None:
            binding.inside.require(self)
        learns += [self.gate_up_proj, self.down_proj]  # a compiler would trace into sealed weights
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learns):
        # The arenas would be overwritten before a backward pass could read them.
        raise UnsupportedError(
            "a paged model cannot compute gradients", fix="call it under torch.no_grad()"
        )
    if torch.compiler.is_compiling():  # a lock would break the graph
        out = _event(self, binding, hidden_states, top_k_index, top_k_weights)
        binding.lock.compiled_by = None  # takes effect when the graph has run
        return out
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
        # The pager was detached while this thread waited; its handle may belong to another pager.
        return type(module).forward(module, hidden_states, top_k_index, top_k_weights)
    if binding.note is not None:
        top_k_index = binding.note(top_k_index, top_k_weights, hidden_states)
    if binding.waves:
        out = torch.empty_like(hidden_states)
        op.compute(out, hidden_states, top_k_weights, top_k_index, binding.handle, binding.layer)
        return out
    slots = op.acquire(top_k_index, binding.handle, binding.layer, binding.lock.turn)
    return binding.twin(hidden_states, top_k_index, slots, top_k_weights)


def can_run_in_waves(layers: list[torch.nn.Module], implementation: str) -> bool:
    """Check one layer with ``require_sound``; return True if all layers may run in waves.

    If possible, the layer has no code of a user, such as a hook that collects its inputs.

    Raises:
        UnsupportedError: See ``require_sound``; or a user's code runs inside the experts, and the
            implementation is ``grouped_mm``, which changes the order of its rows.
    """
    plain = all(map(is_plain, layers))
    if not plain and implementation == "grouped_mm":
        raise UnsupportedError(
            f"a module, hook or method inside {type(layers[0]).__name__} is not from transformers, "
            "and grouped_mm changes the order of its rows",
            fix=CUSTOM,
        )
    layer = next(filter(is_plain, layers), layers[0])
    return require_sound(layer, implementation).waves and plain


def require_sound(layer: torch.nn.Module, implementation: str) -> Checked:
    """Check that a layer computes the same results on slots, with ``backends.selfcheck``.

    Args:
        layer: An experts module, which may be on the meta device. One layer of a model is enough,
            because models whose layers differ in shape or dtype cannot be paged.
        implementation: One of ``IMPLEMENTATIONS``.

    Raises:
        UnsupportedError: The result depends on the slots.
    """

    def kernel(
        parts: Parts,
        table: torch.Tensor | None,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
    ) -> torch.Tensor:
        slots = experts if table is None else table[experts]
        return Twin(layer, implementation, dict(parts), table)(x, experts, slots, weights)

    like = weights_of(layer)
    others = " or ".join(name for name in IMPLEMENTATIONS if name != implementation)
    with torch.no_grad():
        return require_slot_independence(
            kernel,
            like,
            hidden=like["gate_up_proj"].shape[-1],
            top_k=top_k_of(layer) or 1,
            name=f"{implementation} of {type(layer).__name__}",
            fix=f"set {others} with model.set_experts_implementation(), compute with one thread "
            "(OMP_NUM_THREADS=1), or use this model without FluxMoE on this machine",
            copies=implementation == "batched_mm",
        )


def register() -> None:
    """Register the implementation with ``transformers``. Idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
