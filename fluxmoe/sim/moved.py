"""Names that moved out of the simulator; the old names stay valid for one minor version."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def moved(old: str, new: str, names: tuple[str, ...]) -> Callable[[str], Any]:
    """Make a module's ``__getattr__`` that gets ``names`` from their new module, with a warning.

    Args:
        old: Published name of the old module.
        new: Name of the new module.
        names: Moved names.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(
            f"{old}.{name} is deprecated, use {new}.{name}", DeprecationWarning, stacklevel=2
        )
        return getattr(importlib.import_module(new), name)

    return get
