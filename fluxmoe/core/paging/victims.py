"""The choice of victims with a compiled score kernel, without a call into Python.

Stable scores are kept in a ``VictimHeap``. Any other kernel scores all pages of the bank again for
each event that is short of slots. Such a kernel reads *columns*, with one row per slot. The columns
are updated from the list of dirty pages, so the kernel's loop reads memory in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.directory import directory, opener
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.compiled.lowest import ascending, before, low_bits, lowest_bit, offer
from fluxmoe.core.compiled.score_kernel import KernelRows, call_entry
from fluxmoe.core.paging.books import (
    ABSENT,
    DIRTIES,
    DIRTY,
    EVENT,
    LAYER,
    PROTECTED,
    AnyBooks,
    Books,
    mark_dirty,
    new_books,
    open_books,
)
from fluxmoe.core.paging.heap import VictimHeap, choose, open_heap, update
from fluxmoe.core.types import Geometry, Int64s

#: Result of ``victims`` if the kernel raised an exception or returned NaN; nothing has changed.
FAILED = -1


class Chooser(NamedTuple):
    """Working arrays of a kernel for P pages and B banks of M reserved slots."""

    # the columns: input of the kernel, one row per slot [B, M]; [0, 0] if scores are stable
    last_use: Int64s
    use_count: Int64s
    loaded_at: Int64s
    page: Int64s
    layer: Int64s
    next_use: Int64s
    score: npt.NDArray[np.float64]  # [B, M]
    rows: Int64s  # [B, …] directories of each bank's columns, or one directory for stable scores
    future: Int64s  # [P] the next use of each page, for oracles; otherwise zeros
    dirty: Int64s  # [P] scratch
    scores: npt.NDArray[np.float64]  # [P] scratch


def new_chooser(b: Books, *, stable: bool, next_use: Int64s | None = None) -> Chooser:
    """Make the working arrays of a kernel for the pages of these books."""
    pages = b.last_use.size
    shape = (0, 0) if stable else b.page_at.shape
    columns: dict[str, Any] = {name: np.zeros(shape, np.int64) for name in KernelRows._fields}
    dirty = np.zeros(pages, np.int64)
    future = np.zeros(pages, np.int64) if next_use is None else next_use
    if stable:
        rows = [KernelRows(b.last_use, b.use_count, b.loaded_at, dirty, b.layer_of, future)]
    else:
        rows = [KernelRows(*banks) for banks in zip(*columns.values(), strict=True)]
    return Chooser(
        **columns,
        score=np.zeros(shape),
        rows=np.stack([directory(row) for row in rows]),
        future=future,
        dirty=dirty,
        scores=np.zeros(pages),
    )


#: For compiled code: the directory of a chooser → the chooser.
open_chooser = opener(new_chooser(new_books(Geometry(1, 1), 1, 1, None), stable=True))


@jit
def take_dirty(books: AnyBooks, out: Int64s) -> int:
    """Move the dirty pages that may be evicted into ``out``; return their number.

    Pages of the current event stay dirty, including those about to be loaded, so that ``heap`` gets
    their scores in ascending order. Other absent pages get a score when they are loaded again.
    """
    b = open_books(books)
    n = kept = 0
    for i in range(b.now[DIRTIES]):
        page = b.dirty[i]
        if b.last_use[page] == b.now[EVENT]:
            b.dirty[kept] = page
            kept += 1
        elif b.slot_of[page] == ABSENT:
            b.flags[page] &= ~np.uint8(DIRTY)
        else:
            b.flags[page] &= ~np.uint8(DIRTY)
            out[n] = page
            n += 1
    b.now[DIRTIES] = kept
    return n


@jit
def victims(
    books: Int64s,
    heaps: Int64s | None,
    chooser: Int64s,
    entry: int,
    bank: int,
    count: int,
    protect: bool,
    out: Int64s,
) -> int:
    """Write up to ``count`` victims of ``bank`` into ``out``, lowest score first.

    As in point 4 of the event rule, pages of the current event are never victims, and protected
    pages are victims only if ``protect`` is false. The first three arguments are directories;
    ``heaps`` is None unless scores are stable. ``entry`` is that of a ``score_kernel.Kernel``. The
    caller evicts the victims.

    Returns:
        The number of victims, or ``FAILED``.
    """
    b, c = open_books(books), open_chooser(chooser)
    n = take_dirty(b, c.dirty)
    if heaps is not None:  # decided at compile time, so that only one branch is compiled
        heap = open_heap(heaps)
        if n != 0 and not _score_dirty(b, heap, c, entry, n):
            return FAILED
        return choose(heap, b, bank, count, protect, out)
    for i in range(n):
        page = c.dirty[i]
        _put(b, c, b.bank_of[b.layer_of[page]], b.slot_of[page], page)
    return _scan(b, c, entry, bank, count, protect, out)


@jit
def _put(b: Books, c: Chooser, at: int, row: int, page: int) -> None:
    c.last_use[at, row] = b.last_use[page]
    c.use_count[at, row] = b.use_count[page]
    c.loaded_at[at, row] = b.loaded_at[page]
    c.page[at, row] = page
    c.layer[at, row] = b.layer_of[page]
    c.next_use[at, row] = c.future[page]


@jit
def _score_dirty(b: Books, heap: VictimHeap, c: Chooser, entry: int, n: int) -> bool:
    """Record the scores of dirty pages. If the kernel fails, return False; the pages stay dirty."""
    scores = c.scores[:n]
    event, layer, layers = b.now[EVENT], b.now[LAYER], b.bank_of.size
    good = call_entry(entry, c.rows[0], event, layer, layers, n, scores) == 0
    for i in range(n):
        good &= scores[i] == scores[i]
    if not good:
        for i in range(n):
            mark_dirty(b, c.dirty[i])
        return False
    update(heap, b, c.dirty[:n], scores)
    return True


@jit
def _scan(
    b: Books, c: Chooser, entry: int, bank: int, count: int, protect: bool, out: Int64s
) -> int:
    """Score every slot of a bank, and choose the candidates with the lowest scores.

    The scores of other slots are ignored, even NaN.
    """
    slots, kept, scores = b.num_slots[bank], c.scores, c.score[bank]
    event, layer, layers = b.now[EVENT], b.now[LAYER], b.bank_of.size
    if call_entry(entry, c.rows[bank], event, layer, layers, slots, scores) != 0:
        return FAILED
    found, limit = 0, np.inf
    for first in range(0, slots, 64):
        low = low_bits(scores, first, slots, limit)
        while low != 0:
            slot = first + lowest_bit(low)
            low &= low - np.uint64(1)
            page, score = b.page_at[bank, slot], scores[slot]
            if (
                score > limit  # the limit may have fallen since ``low`` was computed
                or page == ABSENT
                or b.last_use[page] == b.now[EVENT]
                or (protect and b.flags[page] & PROTECTED)
            ):
                continue
            if score != score:
                return FAILED
            if found < count or before(score, page, kept[0], out[0]):
                found = offer(kept, out, found, count, score, page)
                limit = kept[0] if found == count else np.inf
    ascending(kept, out, found)
    return found
