"""Twins of experts modules, which compute on arenas, and the code that twins can run.

``grouped_mm`` passes a layer's rows to the activation function in the order of the slots, and waves
pass them in several calls. Neither changes the results of the modules of transformers, but it may
change those of a user's hooks, modules and methods inside the experts (``Inside``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import is_
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch.nn.modules import module as every

from fluxmoe.backends import op
from fluxmoe.backends.sealed import AsComputed
from fluxmoe.backends.torch.names import NAMES
from fluxmoe.errors import UnsupportedError

NAMES.require("twin")  # the imports below would raise an error without a remedy

from transformers.activations import ACT2CLS
from transformers.integrations import moe
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

EAGER = "eager"

#: Remedy if a user's code runs inside the experts.
CUSTOM = (
    "remove it, or set the experts implementation 'eager' or 'batched_mm' before paging, with "
    "memory for one layer's experts"
)

Compute: TypeAlias = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Part → its arena, ``[slots, …]``; each slot has the shape and dtype of an expert's weights.
Arenas: TypeAlias = dict[str, torch.Tensor]

#: Implementations that can compute on slots. All of them read the arenas through ``_LINEAR``.
BY_SLOT: dict[str, Compute] = {
    "grouped_mm": grouped_mm_experts_forward,
    "batched_mm": batched_mm_experts_forward,
}
IMPLEMENTATIONS = (EAGER, *BY_SLOT)
#: The functions that ``transformers`` registers under these names.
_REGISTERED = dict(BY_SLOT)

#: Functions that multiply by the weights. Each implementation calls one of them twice.
_LINEAR = ("_grouped_linear", "_batched_linear")


#: transformers' activation functions, which compute each number independently, without randomness.
_PLAIN = {each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()}


def require_stock(module: torch.nn.Module, implementation: str) -> None:
    """Refuse an implementation that the user has replaced: a twin would not call the replacement.

    Raises:
        UnsupportedError: Another function is registered under its name, or the forward method of
            the module's class is not that of ``transformers``.
    """
    registered = ALL_EXPERTS_FUNCTIONS.get(implementation)
    if registered is not _REGISTERED.get(implementation):
        raise UnsupportedError(
            f"experts computed by a function registered as {implementation} cannot be paged",
            fix=f"remove {implementation} from ALL_EXPERTS_FUNCTIONS before paging",
        )
    # functools.wraps gives a replacement the attribute ``__wrapped__``, but not these globals.
    if getattr(type(module).forward, "__globals__", None) is not vars(moe):
        raise UnsupportedError(
            f"{type(module).__name__}.forward was replaced; such experts cannot be paged",
            fix="replace a method of a module inside the experts instead",
        )


class Twin:
    """A view of an experts module that computes on other weights; everything else is the module's.

    Args:
        module: The experts module, whose weights may have no memory.
        implementation: Computing implementation, one of ``IMPLEMENTATIONS``.
        arenas: Part → weights ``[slots, …]``, or ``[experts, …]`` if there is no table.
        table: Expert table, ``[experts]`` → slot; None if the experts are in their own order.
        turn: The model's turn, which orders the layers' kernels in compiled graphs; None if no
            order is needed.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        implementation: str,
        arenas: Arenas,
        table: torch.Tensor | None,
        turn: torch.Tensor | None = None,
    ) -> None:
        self._module, self._table, self._implementation = module, table, implementation
        self._compute = compute = BY_SLOT.get(implementation)
        self._compiled = compute and (compute if turn is None else _ordered(compute, turn))
        self.resize(arenas)

    def resize(self, arenas: Arenas) -> None:
        """Replace the arenas."""
        others: dict[str, Any] = {}
        for part, arena in arenas.items():
            if self._compute is None and self._table is not None:
                others[part] = ByExpert(arena, self._table)
                others["num_experts"] = len(self._table)
            else:
                # A Parameter, because a compiler makes the shapes of other tensors dynamic.
                others[part] = torch.nn.Parameter(arena, requires_grad=False)
                others["num_experts"] = len(arena)
        self._computed = AsComputed(self._module, others)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        experts: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the layer.

        Args:
            hidden_states: Hidden states, ``[tokens, hidden]``.
            experts: Routed experts, integers ``[tokens, top_k]``.
            slots: Slots of the experts, integers ``[tokens, top_k]``.
            weights: Routing weights, ``[tokens, top_k]``.

        Returns:
            The layer's output, ``[tokens, hidden]``.
        """
        if not torch.compiler.is_compiling():
            require_stock(self._module, self._implementation)
        if self._compute is None or self._compiled is None:
            stock: Compute = type(self._module).forward.__wrapped__
            return stock(self._computed, hidden_states, experts, weights)
        narrow = experts.dtype in (torch.int8, torch.uint8)  # too narrow for slots
        slots = slots.to(torch.int64 if narrow else experts.dtype)
        compute = self._compiled if torch.compiler.is_compiling() else self._compute
        return compute(self._computed, hidden_states, slots, weights)


def _ordered(compute: Compute, turn: torch.Tensor) -> Compute:
    """Make an implementation call ``op.done`` after each read of the arenas.

    The results of the multiplications are materialised in any case. An operator that takes them
    therefore changes neither the fusion of other operations nor the output.
    """

    def ending(multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def linear(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = multiply(*args, **kwargs)
            op.done(out, turn)
            return out

        return linear

    known = compute.__globals__
    names = {**known, **{name: ending(known[name]) for name in _LINEAR}}
    del names["__name__"]  # otherwise torch.compile would find the module's original functions
    return FunctionType(compute.__code__, names)


class ByExpert:
    """Weights of a layer's experts, read from the arena through the layer's expert table."""

    def __init__(self, arena: torch.Tensor, table: torch.Tensor) -> None:
        self.arena, self._table = arena, table

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        return self.arena[self._table[expert]]


class Inside:
    """The code inside an experts module when it was paged, without the module's own hooks."""

    def __init__(self, experts: torch.nn.Module) -> None:
        self._found = tuple(_code(experts))  # holds the objects, so that no ids are reused

    def require(self, experts: torch.nn.Module) -> None:
        """Raise UnsupportedError if the code has changed."""
        found = tuple(_code(experts))
        if len(found) != len(self._found) or not all(map(is_, found, self._found)):
            raise UnsupportedError(
                f"a module, hook or method inside {type(experts).__name__} was changed after the "
                "model was paged",
                fix=CUSTOM,
            )


def is_plain(experts: torch.nn.Module) -> bool:
    """Return True if all code inside an experts module is that of transformers."""
    inside = [module for module in experts.modules() if module is not experts]
    return all(map(has_own_methods, experts.modules())) and all(
        type(module) in _PLAIN and not list(_hooks(module)) for module in inside
    )


def has_own_methods(module: torch.nn.Module) -> bool:
    """Return True if a module's methods are those of torch or transformers."""
    return all(map(_is_theirs, (*filter(callable, vars(module).values()), *_methods(module))))


def _code(experts: torch.nn.Module) -> Iterator[object]:
    """Yield the objects that decide what runs inside an experts module."""
    for module in experts.modules():
        yield module
        yield from filter(callable, vars(module).values())
        yield from _methods(module)
        if module is not experts:
            yield from _hooks(module)


def _hooks(module: torch.nn.Module) -> Iterator[object]:
    """Yield the hooks that run when a module is called, except those of torch's own tools."""
    ours = (module._forward_pre_hooks, module._forward_hooks)
    for hooks in (*ours, every._global_forward_pre_hooks, every._global_forward_hooks):
        yield from (hook for hook in hooks.values() if not _is_theirs(hook))


def _methods(module: torch.nn.Module) -> Iterator[object]:
    """Yield the functions of a module's classes below ``torch.nn.Module``."""
    for each in type(module).__mro__:
        if each is torch.nn.Module:
            return
        yield from filter(callable, vars(each).values())


def _is_theirs(function: object) -> bool:
    """Return True if a function is defined in torch or transformers."""
    inner = getattr(function, "__func__", function)
    home = getattr(inner, "__globals__", {}).get("__name__") or getattr(inner, "__module__", "")
    return str(home).partition(".")[0] in ("torch", "transformers")
