"""Score kernels: a policy's formula for one page, compiled into a loop over pages.

The event rule calls the loop through a function pointer (``Kernel.entry``). The rule itself is thus
compiled once and cached on disk, while the policy's formula is inlined into its own loop, which the
compiler can vectorise to score eight pages at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from fluxmoe.core.compiled.directory import opener
from fluxmoe.core.types import Int64s

#: Names of a kernel's optional parameters, after the first five.
EXTRAS = ("distance", "layer", "num_layers", "next_use")

_FIRST = ("last_use", "use_count", "loaded_at", "event", "page")
_INTS, _FLOATS = types.Array(types.int64, 1, "C"), types.Array(types.float64, 1, "C")
_ENTRY = types.int64(_INTS, types.int64, types.int64, types.int64, types.int64, _FLOATS)


class KernelRows(NamedTuple):
    """Input of kernels, all int64: one row per page of the model, or per slot of a bank.

    ``page`` is the page of each slot, or, with one row per page, the ``[n]`` pages to score.
    """

    last_use: Int64s
    use_count: Int64s
    loaded_at: Int64s
    page: Int64s
    layer: Int64s  # of the page
    next_use: Int64s  # filled for oracles only


_open_rows = opener(KernelRows(*[np.zeros(0, np.int64)] * len(KernelRows._fields)))


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled score kernel.

    Attributes:
        code: For compiled callers, see ``call_entry``.
        fill: The same for Python, by page; exceptions raised by the kernel propagate unchanged.
    """

    code: Any
    fill: Callable[..., None]

    @property
    def entry(self) -> int:
        """Address of the code for compiled callers (``call_entry``)."""
        return int(self.code.address)

    def scores(
        self, rows: KernelRows, event: int, layer: int, num_layers: int
    ) -> npt.NDArray[np.float64]:
        """Score of every row. Exceptions raised by the kernel propagate."""
        out = np.empty(len(rows.page))
        self.fill(rows, event, layer, num_layers, len(out), out)
        return out


@intrinsic
def call_entry(
    context: Any, entry: Any, rows: Any, event: Any, layer: Any, layers: Any, n: Any, out: Any
) -> Any:
    """Write the scores of the first ``n`` slots, or of ``n`` pages, into ``out``.

    ``entry`` is the address of a kernel's code, ``rows`` a directory of ``KernelRows``. Returns 0,
    or 1 if the kernel raised. Compiled code only: to pass an address costs nothing, while numba's
    function values are typed again in every call from Python.
    """

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = context.get_value_type(types.FunctionType(_ENTRY).ftype)
        return builder.call(builder.inttoptr(args[0], pointer), args[1:])

    return _ENTRY.return_type(types.int64, *_ENTRY.args), lower


def compile_kernel(function: Callable[..., float], *, by_slot: bool) -> Kernel:
    """Compile a kernel with the signature described in ``EvictionPolicy.score_kernel``.

    With ``by_slot``, ``entry`` takes one row per slot and scores a whole bank without looking up
    each page's row. For a few pages, looking up is faster than copying into rows.

    Division follows numpy: dividing by zero gives an infinity or NaN and does not raise, since a
    branch per page would prevent vectorisation. Functions with the same code and closure are
    compiled once per process.

    Raises:
        TypeError: Too few parameters, or an unknown one.
        Exception: Numba cannot compile the code.
    """
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    key = function.__code__, id(function.__globals__), function.__defaults__, cells, by_slot
    try:
        known = _compiled.get(key)
    except TypeError:  # its closure holds an unhashable value
        return _compile(function, by_slot)
    if known is None:
        known = _compiled[key] = _compile(function, by_slot), function
    return known[0]


#: Kernels by code and closure. Functions are kept alive so that ids of their globals stay unique.
_compiled: dict[object, tuple[Kernel, Callable[..., float]]] = {}


def _compile(function: Callable[..., float], by_slot: bool) -> Kernel:
    extras = tuple(inspect.signature(function).parameters)[len(_FIRST) :]
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown:
        raise TypeError(f"unknown kernel parameter {unknown[0]!r}; valid: {', '.join(EXTRAS)}")
    integers = [types.int64] * (len(_FIRST) + len(extras))
    one = numba.njit(types.float64(*integers), nogil=True, error_model="numpy")(function)
    # Builds a call with just the parameters the kernel takes; all names are from _FIRST and EXTRAS.
    call = f"lambda {', '.join(_FIRST + EXTRAS)}: one({', '.join(_FIRST + extras)})"
    score = numba.njit(nogil=True, error_model="numpy")(eval(call, {"one": one}))
    fill = _looped(score, by_slot=False)
    return Kernel(_entry(_looped(score, by_slot=True) if by_slot else fill), fill)


def _looped(score: Any, *, by_slot: bool) -> Any:
    @numba.njit(nogil=True, error_model="numpy")
    def fill(rows, event, layer, layers, n, out):  # type: ignore[no-untyped-def]
        for i in range(n):
            row = i if by_slot else rows.page[i]  # resolved at compile time
            distance = rows.layer[row] - layer
            distance += layers if distance <= 0 else 0
            out[i] = score(
                rows.last_use[row], rows.use_count[row], rows.loaded_at[row], event, rows.page[i],
                distance, rows.layer[row], layers, rows.next_use[row],
            )  # fmt: skip

    return fill


def _entry(fill: Any) -> Any:
    @numba.cfunc(_ENTRY, nopython=True)
    def entry(rows, event, layer, layers, n, out):  # type: ignore[no-untyped-def]
        # Exceptions cannot cross a function pointer: return 1, and the Python side calls again.
        try:
            fill(_open_rows(rows), event, layer, layers, n, out)
        except Exception:
            return 1
        return 0

    return entry
