"""Names that have moved out of the simulator: for one minor version they stay where they were."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def moved(old: str, new: str, names: tuple[str, ...]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that warns and fetches ``names`` from where they are now.

    Args:
        old: The module, as it was published.
        new: The module that has the names now.
        names: Which.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(
            f"{old}.{name} is deprecated, use {new}.{name}", DeprecationWarning, stacklevel=2
        )
        return getattr(importlib.import_module(new), name)

    return get
