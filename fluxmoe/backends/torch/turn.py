"""Turns: one forward pass at a time, and what it does.

Between a layer's ``acquire`` and the end of its kernel the arenas must not change. Threads that
share a paged model therefore take turns. A forward pass is a turn, so that the steps of a trace are
passes. Within it, or outside where a layer is called by itself, each layer and each call of the
handle is a turn in which its thread, too, may do nothing else with the model. A compiled model
takes no turns, so its threads are not kept apart.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch

from fluxmoe.backends.torch.shield import Uncopyable
from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Phase
from fluxmoe.errors import UnsupportedError
from fluxmoe.trace import StepRows

T = TypeVar("T")


class Turn(Uncopyable):
    """A re-entrant lock for passes, and what may run within them ``alone``."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.RLock(), Owner()
        self._alone = 0  # the thread that is
        self._phase = Phase.DECODE
        self._shape: tuple[int, int] | None = None

    @property
    def here(self) -> bool:
        """Whether this is the process that pages, not one forked from it."""
        return self._owner.here

    def lock(self) -> AbstractContextManager[object]:
        """The lock, for a ``with`` statement: entering one in C, Ctrl-C cannot lose it.

        Raises:
            UnsupportedError: In a forked process, where it may be held for ever; or this thread
                has it ``alone``.
        """
        self._owner.require()
        if self._alone == threading.get_ident():
            raise UnsupportedError(
                "the model's pages are in use: until a layer's experts are computed, or a call of "
                "the handle has ended, the model can neither be called nor resized, reset, "
                "checked, recorded or closed",
                fix="do it before or after that, not in a policy or a hook inside the experts",
            )
        return self._lock

    def alone(self, work: Callable[[], T]) -> T:
        """Do what uses or moves pages, while nothing else does."""
        with self.lock():
            try:
                self._alone = threading.get_ident()
                return work()
            finally:
                self._alone = 0

    def watch(self, model: torch.nn.Module) -> None:
        """Let the model's forward passes take their turn.

        The method is wrapped: hooks would not be called at the end of a pass that Ctrl-C ended.
        """
        before = model.forward
        model.forward = functools.update_wrapper(functools.partial(self._run, before), before)

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

    def leave(self, model: torch.nn.Module) -> None:
        """Leave the model alone from now on. Idempotent.

        A method that has been wrapped again meanwhile stays as it is, and goes on to take turns.
        """
        wrapped = vars(model).get("forward")
        if isinstance(wrapped, functools.partial) and wrapped.func == self._run:
            del model.forward
            if model.forward != wrapped.args[0]:  # another wrapper, not the method of the class
                model.forward = wrapped.args[0]

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with self.lock():
            outer = self._phase, self._shape
            try:
                self._phase, self._shape = _seen(args, kwargs)
                return forward(*args, **kwargs)
            finally:
                self._phase, self._shape = outer


def _seen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Phase, tuple[int, int] | None]:
    """What a pass with these arguments does, and its rows and their length."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if value is not None:
            rows, length = value.shape[:2]
            return (Phase.PREFILL if length > 1 else Phase.DECODE), (rows, length)
    return Phase.DECODE, None
