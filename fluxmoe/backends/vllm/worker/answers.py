"""Errors of calls that all workers receive: one error instead of one per worker.

vLLM's executor reads the workers' answers by rank and stops at the first error. It would mistake
the remaining answers for those of the next call (https://github.com/vllm-project/vllm/pull/57846),
so only the last worker may raise an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fluxmoe.backends.vllm.compat.worker import errors_of_all, is_last_worker


def together(call: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method raise only on the last worker if it raises on any; the others return None."""

    @wraps(call)
    def answer(*args: Any, **kwargs: Any) -> Any:
        result, own = None, None
        try:
            result = call(*args, **kwargs)
        except Exception as error:
            own = error
        errors = errors_of_all(own)
        if errors and is_last_worker():
            raise own or errors[0]
        return None if errors else result

    return answer
