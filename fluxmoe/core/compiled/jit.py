"""How the core compiles its inner loops: numba, cached on disk, without the GIL, typed as plain.

Numba notices when the file of a cached function has changed, but not when a function, a constant or
a class that it uses from *another* file has: it would then run stale code, or fail to read its own
index. The functions of ``paging`` use those of ``compiled``, so the machine code is filed under a
name that contains a digest of all compiled sources of the core, subfolders included, and of its
own folder where that lies elsewhere.

Numba looks before every access whether the index is negative, which in Python counts from the end.
The event rule consists of accesses, and the look took a third of its time; so indices are unsigned
here, and a negative one is an error like one beyond the end: nobody notices. Constant ones may be
negative.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import ir, types
from numba.core.caching import FunctionCache
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.typed_passes import NopythonTypeInference

F = TypeVar("F", bound=Callable[..., object])


_CORE = Path(__file__).parents[1]
#: A source that is compiled, or that says how. `Rows` of ``score_kernel`` is of the second kind.
_COMPILED = re.compile(rb"^(@jit|import numba|from numba)", re.MULTILINE)


@cache
def _digest(folder: Path) -> str:
    sources = [*sorted(_CORE.rglob("*.py")), *sorted(folder.glob("*.py"))]
    texts = (path.read_bytes() for path in sources)
    compiled = (text for text in texts if _COMPILED.search(text))
    return hashlib.sha256(b"".join(compiled)).hexdigest()[:8]


class _Cache(FunctionCache):
    """Numba's, but for a disk that is full and for files that are damaged: then it compiles."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling makes of such a file
            with contextlib.suppress(OSError):
                self.flush()  # the next one to compile begins a new index
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


@register_pass(mutates_CFG=False, analysis_only=False)
class _NoNegativeIndex(FunctionPass):
    """Gives every index of an array the type of an unsigned number, once all types are known."""

    _name = "no_negative_index"

    def __init__(self) -> None:  # numba's is abstract
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        for node, signature in list(state.calltypes.items()):
            subscript = isinstance(node, ir.SetItem) or getattr(node, "op", None) == "getitem"
            if subscript and isinstance(signature.args[0], types.Array):
                array, index, *value = signature.args
                unsigned = array, _unsigned(index), *value
                del state.calltypes[node]  # numba's dictionary does not let itself be overwritten
                state.calltypes[node] = signature.replace(args=unsigned)
        return True


def _unsigned(index: Any) -> Any:
    if isinstance(index, types.BaseTuple):
        return types.Tuple([_unsigned(part) for part in index])
    return types.uintp if isinstance(index, types.Integer) else index


class _Compiler(CompilerBase):
    """Numba's, for code without negative indices."""

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_NoNegativeIndex, NopythonTypeInference)
        passes.finalize()
        return [passes]


def jit(function: F) -> F:
    """Compile ``function`` on first use and keep the machine code beside its source file.

    For inner loops over arrays that the caller owns: what is compiled cannot allocate, so no array
    needs its references counted, and it is merged into its compiled callers. Both together make
    the event rule, with some thirty arrays, five to ten times as fast.
    """
    return _cached(function, {"_nrt": False, "forceinline": True})


def jit_allocating(function: F) -> F:
    """The same for functions that make arrays of their own."""
    return _cached(function, {})


def _cached(function: F, options: dict[str, bool]) -> F:
    folder = Path(function.__code__.co_filename).parent
    function.__qualname__ += f"_{_digest(folder)}"  # the name of the cache file comes from it
    compiled = numba.njit(nogil=True, pipeline_class=_Compiler, **options)(function)
    # An error here means: neither beside the source nor in the user's cache may files be written.
    with contextlib.suppress(RuntimeError):
        compiled._cache = _Cache(function)  # as enable_caching() does
    return cast(F, compiled)
