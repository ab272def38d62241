"""The books of a page table: its arrays, and compiled code that loads and unloads pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.directory import opener
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.types import Bools, Bytes, Geometry, Int64s

NEVER = -1
ABSENT = -1

# Bits of Books.flags.
PROTECTED = 1  # prefetched, and the next event of the page's layer has not begun
UNUSED = 2  # prefetched and not yet used
DIRTY = 4  # accessed or loaded since the page's score was last computed

# Indices into Books.now.
EVENT, STEP, LAYER, PAGES, MISSES, LOADED, DIRTIES, LEAVING, CHANGES, RELOADED = range(10)

#: Value of ``now[CHANGES]`` if more pages have changed than ``changed`` lists.
ALL_PAGES = -1

# Indices into Books.counts, in the order of types.Counters.
(
    C_EVENTS,
    C_ACCESSES,
    C_HITS,
    C_MISSES,
    C_EVICTIONS,
    C_RELEASED,
    C_RESIZED,
    C_PREFETCH_HITS,
    C_LOADS_DEMAND,
    C_LOADS_PREFETCH,
    C_COLD,
    C_RELOADS,
) = range(12)


class Books(NamedTuple):
    """The arrays of a PageTable: P pages, B banks of M reserved slots, L layers of E experts."""

    # per page [P]
    last_use: Int64s
    use_count: Int64s
    loaded_at: Int64s
    slot_of: npt.NDArray[np.int32]
    flags: Bytes
    present: npt.NDArray[np.uint64]  # one bit per page, set where slot_of is not ABSENT [P / 64]
    # per bank: slot → page [B, M]; stack of free slots [B, M] and its height [B]
    page_at: Int64s
    free: npt.NDArray[np.int32]
    num_free: Int64s
    num_slots: Int64s  # usable slots [B]
    bank_of: Int64s  # layer → bank [L]
    layer_of: Int64s  # page → layer [P]; a division would cost more than all other work per page
    # the current event: its distinct pages [E], their token counts, hit flags, the missing pages
    pages: Int64s
    tokens: Int64s
    routed: Int64s  # scratch, zero between events: tokens per expert [E]
    asked: npt.NDArray[np.uint64]  # also scratch: one bit per expert with tokens [E / 64]
    hit: Bools
    missing: Int64s
    loaded: Int64s  # newly loaded pages, in order
    leaving: Int64s  # pages to unload when the next event begins
    dirty: Int64s  # pages whose score must be recomputed [P]
    changed: Int64s  # pages whose usage records changed since ``show``, with repeats [P]
    now: Int64s  # scalars; EVENT … are their indices
    counts: Int64s  # C_EVENTS … are its indices


def new_books(geometry: Geometry, banks: int, width: int, bank_of: Sequence[int] | None) -> Books:
    """Make empty books, in which no page has a slot."""
    pages, experts = geometry.num_pages, geometry.experts_per_layer
    return Books(
        last_use=np.full(pages, NEVER, np.int64),
        use_count=np.zeros(pages, np.int64),
        loaded_at=np.full(pages, NEVER, np.int64),
        slot_of=np.full(pages, ABSENT, np.int32),
        flags=np.zeros(pages, np.uint8),
        present=np.zeros(-(-pages // 64), np.uint64),
        page_at=np.full((banks, width), ABSENT, np.int64),
        free=np.zeros((banks, width), np.int32),
        num_free=np.zeros(banks, np.int64),
        num_slots=np.zeros(banks, np.int64),
        bank_of=np.asarray(bank_of or [0] * geometry.num_layers, np.int64),
        layer_of=np.repeat(np.arange(geometry.num_layers), experts),
        pages=np.zeros(experts, np.int64),
        tokens=np.zeros(experts, np.int64),
        routed=np.zeros(experts, np.int64),
        asked=np.zeros(-(-experts // 64), np.uint64),
        hit=np.zeros(experts, np.bool_),
        missing=np.zeros(experts, np.int64),
        loaded=np.zeros(pages, np.int64),
        leaving=np.zeros(experts, np.int64),
        dirty=np.zeros(pages, np.int64),
        changed=np.zeros(pages, np.int64),
        now=np.zeros(10, np.int64),
        counts=np.zeros(12, np.int64),
    )


#: For compiled code: the directory of books → the books.
open_books = opener(new_books(Geometry(1, 1), 1, 1, None))
AnyBooks = Books | Int64s


class Shown(NamedTuple):
    """Copies of the books' usage records, ``[P]``, for policies."""

    last_use: Int64s
    use_count: Int64s
    loaded_at: Int64s


open_shown = opener(Shown(*[np.zeros(0, np.int64)] * 3))


@jit
def note(b: Books, pages: Int64s, n: int) -> None:
    """List the first ``n`` of ``pages`` as changed.

    If the list has no room, the next ``show`` copies all records, and nothing is listed until then.
    """
    count = b.now[CHANGES]
    if count == ALL_PAGES:
        return
    if count + n > b.changed.size:
        b.now[CHANGES] = ALL_PAGES
        return
    for i in range(n):
        b.changed[count + i] = pages[i]
    b.now[CHANGES] = count + n


@jit
def show(books: AnyBooks, shown: Shown | Int64s) -> None:
    """Copy the records of the pages that have changed. Both arguments may be directories."""
    b, s = open_books(books), open_shown(shown)
    if b.now[CHANGES] == ALL_PAGES:
        for page in range(b.last_use.size):
            _show(b, s, page)
    else:
        for i in range(b.now[CHANGES]):
            _show(b, s, b.changed[i])
    b.now[CHANGES] = 0


@jit
def _show(b: Books, s: Shown, page: int) -> None:
    s.last_use[page] = b.last_use[page]
    s.use_count[page] = b.use_count[page]
    s.loaded_at[page] = b.loaded_at[page]


@jit
def bit(number: int) -> np.uint64:
    """Return the bit of a page or an expert in its 64-bit word."""
    return np.uint64(1) << np.uint64(number & 63)


@jit
def unload(b: Books, page: int) -> None:
    """Remove ``page`` from its slot, which becomes free."""
    bank = b.bank_of[b.layer_of[page]]
    slot = b.slot_of[page]
    b.slot_of[page] = ABSENT
    b.page_at[bank, slot] = ABSENT
    b.flags[page] &= DIRTY
    b.present[page >> 6] &= ~bit(page)
    b.free[bank, b.num_free[bank]] = slot
    b.num_free[bank] += 1


@jit
def load(b: Books, page: int) -> None:
    """Assign ``page`` a free slot of its bank, and append the page to the loaded pages."""
    bank = b.bank_of[b.layer_of[page]]
    b.num_free[bank] -= 1
    slot = b.free[bank, b.num_free[bank]]
    b.slot_of[page] = slot
    b.present[page >> 6] |= bit(page)
    b.page_at[bank, slot] = page
    b.loaded_at[page] = b.now[EVENT]
    b.loaded[b.now[LOADED]] = page
    b.now[LOADED] += 1
    mark_dirty(b, page)


@jit
def release_leaving(b: Books) -> None:
    """Apply point 6 of the event rule: unload the last event's pages that were not retained."""
    for i in range(b.now[LEAVING]):
        if b.slot_of[b.leaving[i]] != ABSENT:
            unload(b, b.leaving[i])
            b.counts[C_RELEASED] += 1
    b.now[LEAVING] = 0


@jit
def mark_dirty(b: Books, page: int) -> None:
    """Record that the score of ``page`` may have changed."""
    if not b.flags[page] & DIRTY:
        b.flags[page] |= DIRTY
        b.dirty[b.now[DIRTIES]] = page
        b.now[DIRTIES] += 1


@jit
def compact(b: Books, bank: int, slots: int, moved: Int64s, source: Int64s) -> int:
    """Move a bank's pages from slots ``slots …`` into lower free slots; return their number.

    ``moved[i]`` is filled with a moved page, and ``source[i]`` with its previous slot. There must
    be enough free slots below ``slots``. Scores are stored by slot (``heap``, ``victims``), so the
    scores of the moved pages are recomputed.
    """
    n = 0
    for slot in range(slots, b.page_at.shape[1]):
        if b.page_at[bank, slot] != ABSENT:
            moved[n], source[n] = b.page_at[bank, slot], slot
            n += 1
    free = 0
    for i in range(n):
        while b.page_at[bank, free] != ABSENT:
            free += 1
        b.page_at[bank, source[i]] = ABSENT
        b.page_at[bank, free] = moved[i]
        b.slot_of[moved[i]] = free
        mark_dirty(b, moved[i])  # because its score is stored under the old slot
    # Rebuild the stack of free slots, with the lowest slot on top.
    b.num_free[bank] = 0
    for slot in range(slots - 1, -1, -1):
        if b.page_at[bank, slot] == ABSENT:
            b.free[bank, b.num_free[bank]] = slot
            b.num_free[bank] += 1
    return n
