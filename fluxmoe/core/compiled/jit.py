"""Compilation of the core's inner loops by numba: cached on disk, and run without the GIL.

Numba detects changes to the file of a cached function, but not to functions, constants or classes
used from *other* files: it would run stale code or fail to read its own index. Since ``paging``
uses functions of ``compiled``, cache names contain a digest of all compiled sources of the core,
including subfolders, and of the function's own folder if that folder is outside the core.

Numba checks every array access for a negative index, which in Python counts from the end. The event
rule consists of such accesses, and the checks took a third of its time. Indices are therefore
unsigned here: a negative index, like an index past the end, is an undetected error. Only constant
indices may be negative.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import ir, types
from numba.core.caching import FunctionCache, NullCache
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.typed_passes import NopythonTypeInference

F = TypeVar("F", bound=Callable[..., object])

#: Logger that announces compilation, which takes many seconds without other output.
logger = logging.getLogger("fluxmoe.compile")

_CORE = Path(__file__).parents[1]
#: Matches sources that contain compiled functions, or tuples that these use (``EventList``).
_COMPILED = re.compile(rb"^(@jit|import numba|from numba|class \w+\(NamedTuple\))", re.MULTILINE)


@cache
def _digest(folder: Path) -> str:
    sources = [*sorted(_CORE.rglob("*.py")), *sorted(folder.glob("*.py"))]
    texts = (path.read_bytes() for path in sources)
    compiled = (text for text in texts if _COMPILED.search(text))
    return hashlib.sha256(b"".join(compiled)).hexdigest()[:8]


@cache
def _announce(how_often: str) -> None:
    logger.info("compiling inner loops of FluxMoE, %s: up to half a minute", how_often)


class _Cache(FunctionCache):
    """Numba's cache, except that a full disk or a damaged file triggers recompilation."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # unpickling a damaged file can raise any exception
            with contextlib.suppress(OSError):
                self.flush()  # the next compilation creates a new index
            found = None
        if found is None:
            _announce("which later runs reuse")
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


class _NoCache(NullCache):
    """A null cache, used if neither the sources' nor the user's folder is writable."""

    def load_overload(self, sig: Any, target_context: Any) -> None:
        _announce("at every start, because no folder to store them in is writable")


@register_pass(mutates_CFG=False, analysis_only=False)
class _NoNegativeIndex(FunctionPass):
    """Makes every array index unsigned, after type inference."""

    _name = "no_negative_index"

    def __init__(self) -> None:  # abstract in numba
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        for node, signature in list(state.calltypes.items()):
            subscript = isinstance(node, ir.SetItem) or getattr(node, "op", None) == "getitem"
            if subscript and isinstance(signature.args[0], types.Array):
                array, index, *value = signature.args
                unsigned = array, _unsigned(index), *value
                del state.calltypes[node]  # numba's dictionary forbids overwriting
                state.calltypes[node] = signature.replace(args=unsigned)
        return True


def _unsigned(index: Any) -> Any:
    if isinstance(index, types.BaseTuple):
        return types.Tuple([_unsigned(part) for part in index])
    return types.uintp if isinstance(index, types.Integer) else index


class _Compiler(CompilerBase):
    """Numba's compiler for code without negative indices."""

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_NoNegativeIndex, NopythonTypeInference)
        passes.finalize()
        return [passes]


def jit(function: F) -> F:
    """Compile ``function`` on first use and cache the machine code beside its source file.

    This is for inner loops over arrays that the caller owns: the code cannot allocate, so that
    arrays need no reference counting, and it is inlined into compiled callers. These options
    together make the event rule, with some thirty arrays, five to ten times as fast.
    """
    return _cached(function, {"_nrt": False, "forceinline": True})


def jit_allocating(function: F) -> F:
    """Compile ``function`` like ``jit``, but let it allocate arrays."""
    return _cached(function, {})


def _cached(function: F, options: dict[str, bool]) -> F:
    folder = Path(function.__code__.co_filename).parent
    function.__qualname__ += f"_{_digest(folder)}"  # determines the name of the cache file
    compiled = numba.njit(nogil=True, pipeline_class=_Compiler, **options)(function)
    try:
        compiled._cache = _Cache(function)  # as enable_caching() does
    except RuntimeError:
        compiled._cache = _NoCache()
    return cast(F, compiled)
