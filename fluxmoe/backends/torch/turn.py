"""Whose turn it is: one forward pass at a time, and what it does.

Between a layer's ``acquire`` and the end of its kernel the arenas must not change. Threads that
share a paged model therefore take turns, a forward pass each; so do calls of the handle.
A compiled model runs no hooks, so its threads are not kept apart.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from fluxmoe.backends.torch.shield import Uncopyable
from fluxmoe.core.types import Phase
from fluxmoe.trace import StepRows


class Turn(Uncopyable):
    """A lock that the model's forward pass holds. Use it as a context manager elsewhere."""

    def __init__(self) -> None:
        self._free, self._owner = threading.Lock(), 0
        self._phase = Phase.DECODE
        self._shape: tuple[int, int] | None = None
        self._hooks: list[Any] = []

    def watch(self, model: torch.nn.Module) -> None:
        """Let the model's forward passes take their turn."""
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def phase(self) -> Phase:
        """What the running pass does, seen from the length of its input; compiled: decode."""
        return self._phase

    def rows(self, tokens: int) -> StepRows | None:
        """The running step's tokens, requests being rows of the batch; None if nobody saw it."""
        shape, self._shape = self._shape, None
        if shape is None or shape[0] * shape[1] != tokens:
            return None
        request = np.repeat(np.arange(shape[0], dtype=np.int32), shape[1])
        return StepRows(request, np.full(tokens, self._phase, np.int8))

    def remove(self) -> None:
        """Leave the model alone from now on. Idempotent."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> None:
        # A pass that was ended by KeyboardInterrupt has never called its last hook: whoever
        # asks for the turn that is his goes on with it.
        if self._owner != threading.get_ident():
            self._free.acquire()
            self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        if self._owner == threading.get_ident():
            self._owner = 0
            self._free.release()

    def _begin(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self.__enter__()
        for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
            if value is not None:
                self._shape = (value.shape[0], value.shape[1])
                self._phase = Phase.PREFILL if value.shape[1] > 1 else Phase.DECODE
                return

    def _end(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self.__exit__()
