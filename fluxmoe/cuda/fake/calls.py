"""Common behaviour of the fake driver's functions: faults, context checks and result tuples."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fluxmoe.cuda.fake.names import CUresult, Refused


def driver_call(answers: int = 0, *, context: bool = True) -> Callable[[Any], Any]:
    """Make a decorator of driver functions, which return a ``CUresult`` and ``answers`` values."""

    def wrap(function: Any) -> Any:
        @wraps(function)
        def call(self: Any, *args: Any) -> tuple[Any, ...]:
            with self._lock:
                try:
                    self.plan.reach(function.__name__)
                    if self.lost is not None:
                        raise Refused(self.lost)
                    if context and not self._contexts():
                        raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
                    found = function(self, *args)
                except Refused as refused:
                    return (refused.result, *[None] * answers)
            return (CUresult.CUDA_SUCCESS, *([found] if answers == 1 else found or ()))

        return call

    return wrap


def require(condition: bool, result: CUresult = CUresult.CUDA_ERROR_INVALID_VALUE) -> None:
    """Make the driver call return ``result`` unless a condition holds."""
    if not condition:
        raise Refused(result)
