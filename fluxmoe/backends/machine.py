"""What the machine has."""

from __future__ import annotations

import psutil

from fluxmoe.errors import ConfigError


def require_free(budget: int, *, held: int = 0) -> None:
    """Refuse a budget, in bytes, beyond the memory that is free, or that it holds already.

    Raises:
        ConfigError: Names both.
    """
    available = psutil.virtual_memory().available + held
    if budget > available:
        raise ConfigError(
            f"a budget of {budget} bytes is more than the {available} bytes that are free",
            where="memory.budget",
            fix="lower it",
        )
