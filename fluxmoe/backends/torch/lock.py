"""The forward lock of a paged model: one forward pass at a time.

The arenas must not change between a layer's ``acquire`` and the end of its kernel. Threads that
share a paged model therefore alternate only between whole forward passes, so that each step of a
trace is one pass. Each execution of a layer, within a pass or by itself, and each call to the
handle is an exclusive section, during which even the same thread may do nothing else with the
model.

A compiled pass cannot hold a lock, because all its actions outside the graph happen after the graph
has run. The first event of a compiled pass therefore claims the model, and an assignment that torch
replays at the end of the pass releases it. Until then, calls from other threads are refused.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch

from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Phase
from fluxmoe.errors import UnsupportedError
from fluxmoe.trace import StepRows

T = TypeVar("T")


class ForwardLock:
    """A re-entrant lock for passes, with exclusive sections (``alone``) inside them."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.RLock(), Owner()
        with torch.inference_mode(False):  # compiled graphs cannot mutate an inference tensor
            #: The model's turn, which orders kernels and ``op.acquire`` in compiled graphs.
            self.turn = torch.zeros(1, dtype=torch.uint8)
        self._alone = 0  # id of the thread in an exclusive section
        #: Thread whose compiled pass is running, or was interrupted.
        self.compiled_by: threading.Thread | None = None
        self._phase = Phase.DECODE
        self._shape: tuple[int, int] | None = None

    @property
    def here(self) -> bool:
        """True in the process that pages the model, False in processes forked from it."""
        return self._owner.here

    def lock(self) -> AbstractContextManager[object]:
        """Return the lock, for use in a ``with`` statement.

        The ``with`` statement takes the lock in C, so that Ctrl-C cannot leave the lock taken.

        Raises:
            UnsupportedError: This is a forked process, where the lock may never be released, or
                this thread is in an exclusive section.
        """
        self._owner.require()
        if self._alone == threading.get_ident():
            raise UnsupportedError(
                "the model's pages are in use: until a layer's experts are computed, or a call to "
                "the handle has ended, the model can neither be called nor resized, reset, "
                "checked, recorded or closed",
                fix="do it before or after that, not in a policy or a hook inside the experts",
            )
        return self._lock

    def alone(self, work: Callable[[], T]) -> T:
        """Run ``work``, which uses or moves pages, as an exclusive section."""
        with self.lock():
            self._require_unclaimed()
            try:
                self._alone = threading.get_ident()
                return work()
            finally:
                self._alone = 0

    @property
    def compiled_pass(self) -> bool:
        """True if the current event of this thread belongs to a compiled pass."""
        return self._alone != threading.get_ident()

    def claim(self) -> None:
        """Claim the model for this thread if the current event belongs to a compiled pass.

        Raises:
            UnsupportedError: Another thread is running a compiled pass.
        """
        if self.compiled_pass:
            with self.lock():  # waits for the end of an eager pass
                self._require_unclaimed()
                self.compiled_by = threading.current_thread()

    def _require_unclaimed(self) -> None:
        by = self.compiled_by
        if by is not None and by is not threading.current_thread() and by.is_alive():
            raise UnsupportedError(
                "a compiled model can be used by one thread at a time, and "
                f"{by.name} is using it, or was interrupted",
                fix="put a lock around each call; after an interruption, call the model once more "
                "in that thread, or end the thread",
            )

    def watch(self, model: torch.nn.Module) -> None:
        """Wrap the forward passes of the model and of its base model in the lock.

        The methods are wrapped because hooks are not called after a pass interrupted by Ctrl-C.
        """
        for each in {model, model.base_model}:
            before = each.forward
            each.forward = functools.update_wrapper(functools.partial(self._run, before), before)

    def phase(self) -> Phase:
        """Return the phase of the current pass from its input's length; decode if compiled."""
        return self._phase

    def rows(self, tokens: int) -> StepRows | None:
        """Describe the current step's tokens, with one request per batch row; None if unknown."""
        shape, self._shape = self._shape, None
        if shape is None or shape[0] * shape[1] != tokens:
            return None
        request = np.repeat(np.arange(shape[0], dtype=np.int32), shape[1])
        return StepRows(request, np.full(tokens, self._phase, np.int8))

    def leave(self, model: torch.nn.Module) -> None:
        """Unwrap the model. Idempotent.

        If other code has since wrapped a forward method, the wrapper from ``watch`` stays and keeps
        taking the lock.
        """
        for each in {model, model.base_model}:
            wrapped = vars(each).get("forward")
            if isinstance(wrapped, functools.partial) and wrapped.func == self._run:
                del each.forward
                if each.forward != wrapped.args[0]:  # an attribute, not the class's method
                    each.forward = wrapped.args[0]

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with self.lock():
            self._require_unclaimed()
            outer = self._phase, self._shape
            try:
                self._phase, self._shape = _seen(args, kwargs)
                return forward(*args, **kwargs)
            finally:
                self._phase, self._shape = outer


def _seen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Phase, tuple[int, int] | None]:
    """Determine a pass's phase, and the number and length of its rows, from its arguments."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if value is not None:
            rows, length = value.shape[:2]
            return (Phase.PREFILL if length > 1 else Phase.DECODE), (rows, length)
    return Phase.DECODE, None
