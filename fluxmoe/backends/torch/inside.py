"""The code inside an experts module that a twin runs: modules, hooks and replaced methods.

``grouped_mm`` passes a layer's rows to the activation function in the order of the slots, and waves
pass them in several calls. The self-check shows that neither changes the result, but only for the
code that it has run.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_

import torch
from transformers.activations import ACT2CLS

from fluxmoe.errors import UnsupportedError

#: transformers' activation functions, which compute each number independently, without randomness.
_PLAIN = {each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()}


class Inside:
    """The code inside an experts module when it was checked, without the module's own hooks."""

    def __init__(self, experts: torch.nn.Module) -> None:
        self._found = tuple(_code(experts))  # holds the objects, so that no ids are reused

    def require(self, experts: torch.nn.Module) -> None:
        """Raise UnsupportedError if the code has changed."""
        found = tuple(_code(experts))
        if len(found) != len(self._found) or not all(map(is_, found, self._found)):
            raise UnsupportedError(
                f"a module, hook or method inside {type(experts).__name__} was changed, or a "
                "Dropout was enabled, after the model was paged",
                fix="change it before paging, or set the experts implementation 'eager' and a "
                "budget without waves",
            )


def _code(experts: torch.nn.Module) -> Iterator[object]:
    """Yield the objects that decide what runs inside an experts module."""
    yield from filter(callable, vars(experts).values())
    for module in experts.modules():
        if module is experts:
            continue
        yield module
        yield from module._forward_pre_hooks.values()
        yield from module._forward_hooks.values()
        yield from filter(callable, vars(module).values())
        if type(module) not in _PLAIN:
            yield module.training


def code_of(experts: torch.nn.Module) -> tuple[object, ...]:
    """Return a key that is the same for modules in which the same code runs."""
    return tuple(type(each) if type(each) in _PLAIN else id(each) for each in _code(experts))


def is_plain(code: tuple[object, ...]) -> bool:
    """Return True if a result of ``code_of`` has only activation functions of transformers."""
    return all(isinstance(each, type) for each in code)
