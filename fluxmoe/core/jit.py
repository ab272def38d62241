"""How the core compiles its inner loops: numba, cached on disk, without the GIL, typed as plain.

Numba notices when the file of a cached function has changed, but not when a function or a constant
that it uses from *another* file has. The functions of ``event`` and ``order`` use those of
``pages``, so their machine code is stamped with the state of all files of the core.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])

_STAMP = tuple(
    (path.name, path.stat().st_mtime_ns, path.stat().st_size)
    for path in sorted(Path(__file__).parent.glob("*.py"))
)


def jit(function: F) -> F:
    """Compile ``function`` on first use and keep the machine code beside its source file."""
    compiled = numba.njit(nogil=True)(function)
    try:
        compiled.enable_caching()
    except RuntimeError:  # neither here nor in the user's cache folder may files be written
        return cast(F, compiled)
    compiled._cache._cache_file._source_stamp = _STAMP
    return cast(F, compiled)
