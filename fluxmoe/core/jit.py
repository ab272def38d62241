"""How the core compiles its inner loops: numba, cached on disk, without the GIL, typed as plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def jit(function: F) -> F:
    """Compile ``function`` on first use and keep the machine code beside its source file."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))
