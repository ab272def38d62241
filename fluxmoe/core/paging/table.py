"""PageTable: which expert page lies in which slot, and all that is known about each page.

The books are plain numpy arrays (``Books``), because three readers share them: the event rule,
compiled by numba (``event``), policies, which see read-only views, and kernels, which need the
expert table ``slot_of``. Slots are counted per *bank*; nearly every model has one bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.directory import directory, opener
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.types import Bools, Bytes, Counters, Geometry, Int64s, Phase
from fluxmoe.errors import CapacityError, InvariantError

NEVER = -1
ABSENT = -1

# Bits of Books.flags.
PROTECTED = 1  # prefetched, and its layer's next event has not begun
UNUSED = 2  # prefetched and not used since
DIRTY = 4  # accessed or loaded since its score was last computed

# Indices into Books.now.
EVENT, STEP, LAYER, PAGES, MISSES, LOADED, DIRTIES, LEAVING = range(8)

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
) = range(11)


class Books(NamedTuple):
    """The arrays behind a PageTable. P pages, B banks, M slots reserved per bank, E experts."""

    # per page [P]
    last_use: Int64s
    use_count: Int64s
    loaded_at: Int64s
    slot_of: npt.NDArray[np.int32]
    flags: Bytes
    present: npt.NDArray[np.uint64]  # a bit per page, set where slot_of is not ABSENT [P / 64]
    # per bank: slot -> page [B, M]; a stack of free slots [B, M] and its height [B]
    page_at: Int64s
    free: npt.NDArray[np.int32]
    num_free: Int64s
    num_slots: Int64s  # usable slots [B]
    bank_of: Int64s  # layer -> bank [L]
    layer_of: Int64s  # page -> layer [P]; a division would cost more than all else about a page
    # the running event: its distinct pages [E], their tokens, hits, misses, the slots given out
    pages: Int64s
    tokens: Int64s
    routed: Int64s  # scratch, zero between events: tokens per expert [E], and which have any,
    asked: npt.NDArray[np.uint64]  # a bit each [E / 64]
    hit: Bools
    missing: Int64s
    loaded: Int64s  # pages given a slot, in order
    leaving: Int64s  # pages to be freed once the layer has run
    dirty: Int64s  # pages whose score must be computed anew [P]
    now: Int64s  # scalars, see EVENT …
    counts: Int64s  # see C_EVENTS …


def _new_books(geometry: Geometry, banks: int, width: int, bank_of: Sequence[int] | None) -> Books:
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
        now=np.zeros(8, np.int64),
        counts=np.zeros(11, np.int64),
    )


#: For compiled code: the directory of books → the books.
open_books = opener(_new_books(Geometry(1, 1), 1, 1, None))


@jit
def bit(number: int) -> np.uint64:
    """The bit of a page or expert in its word of 64."""
    return np.uint64(1) << np.uint64(number & 63)


@jit
def unload(b: Books, page: int) -> None:
    """Take ``page`` out of its slot, which becomes free."""
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
    """Give ``page`` a free slot of its bank and note it among the loaded."""
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
    """Point 6 of the event rule: free the pages of the last event that were not retained."""
    for i in range(b.now[LEAVING]):
        if b.slot_of[b.leaving[i]] != ABSENT:
            unload(b, b.leaving[i])
            b.counts[C_RELEASED] += 1
    b.now[LEAVING] = 0


@jit
def mark_dirty(b: Books, page: int) -> None:
    """Note that the score of ``page`` may have changed."""
    if not b.flags[page] & DIRTY:
        b.flags[page] |= DIRTY
        b.dirty[b.now[DIRTIES]] = page
        b.now[DIRTIES] += 1


@jit
def compact(b: Books, bank: int, slots: int, moved: Int64s, source: Int64s) -> int:
    """Move the pages of a bank that lie in slots ``slots …`` into free slots below; how many.

    ``moved[i]`` lay in slot ``source[i]``. There must be a free slot below for each of them.
    Scores are kept by slot (``order``, ``chooser``): those of the moved pages are computed anew.
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
        mark_dirty(b, moved[i])  # what is known of its score is filed under its slot
    # The stack of free slots anew, the lowest on top.
    b.num_free[bank] = 0
    for slot in range(slots - 1, -1, -1):
        if b.page_at[bank, slot] == ABSENT:
            b.free[bank, b.num_free[bank]] = slot
            b.num_free[bank] += 1
    return n


class PageTable:
    """Residency of all pages of a model: page ↔ slot, per bank, and the books of the event rule.

    Args:
        geometry: Layers and experts.
        slots: Usable slots per bank, each at least ``experts_per_layer``.
        reserved: Slots that banks may grow to; by default ``max(slots)``.
        bank_of: The bank of each layer; by default all in bank 0.

    Raises:
        CapacityError: A bank could not hold one layer's experts, so an event would be split.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots: Sequence[int],
        *,
        reserved: int | None = None,
        bank_of: Sequence[int] | None = None,
        minimum: int | None = None,
    ) -> None:
        self.geometry = geometry
        #: The fewest slots of a bank: one layer's experts, or the largest event of a known trace.
        self.minimum = geometry.experts_per_layer if minimum is None else minimum
        banks, width = len(slots), max(*slots, reserved or 0, self.minimum)
        self.books = _new_books(geometry, banks, width, bank_of)
        #: Where they lie, for compiled code (``open_books``).
        self.directory = directory(self.books)
        if not np.isin(self.books.bank_of, np.arange(banks)).all() or (
            len(self.books.bank_of) != geometry.num_layers
        ):
            raise InvariantError(f"bank_of must name one of {banks} banks for each layer")
        self.slots = [0] * banks
        self.phase = Phase.DECODE
        self.reset()
        for bank, count in enumerate(slots):
            self.resize(bank, count)

    # --- reading ---------------------------------------------------------------------------------

    @property
    def event(self) -> int:
        """The running event, counted from 0; −1 before the first."""
        return int(self.books.now[EVENT])

    @property
    def step(self) -> int:
        """The running forward pass."""
        return int(self.books.now[STEP])

    @property
    def layer(self) -> int:
        """The MoE layer of the running event."""
        return int(self.books.now[LAYER])

    @property
    def num_banks(self) -> int:
        return len(self.slots)

    @property
    def expert_table(self) -> npt.NDArray[np.int32]:
        """``[layers, experts]`` → slot in the layer's bank, −1 if absent. A view, not a copy."""
        shape = (self.geometry.num_layers, self.geometry.experts_per_layer)
        return self.books.slot_of.reshape(shape)

    @property
    def resident(self) -> Bools:
        """Per page, whether it has a slot."""
        mask: Bools = self.books.slot_of != ABSENT
        return mask

    def counters(self) -> Counters:
        return Counters(*self.books.counts.tolist())

    def bank(self, layer: int) -> int:
        return int(self.books.bank_of[layer])

    # --- changing --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything: no page resident, counters zero, events from 0 again."""
        b = self.books
        for array, value in (
            (b.last_use, NEVER),
            (b.use_count, 0),
            (b.loaded_at, NEVER),
            (b.slot_of, ABSENT),
            (b.flags, 0),
            (b.present, 0),
            (b.page_at, ABSENT),
            (b.counts, 0),
            (b.now, 0),
        ):
            array[...] = value
        b.now[EVENT] = b.now[LAYER] = b.now[STEP] = -1
        for bank, count in enumerate(self.slots):
            # Popped from the top: the lowest slot goes first, so a bank can shrink from its tail.
            b.free[bank, :count] = np.arange(count - 1, -1, -1)
            b.num_free[bank] = count

    def discard(self, pages: Int64s) -> None:
        """Undo the loading of pages whose copy failed; not counted as evictions."""
        for page in pages.tolist():
            if self.books.slot_of[page] != ABSENT:
                unload(self.books, page)

    def require(self, slots: int) -> None:
        """Raise CapacityError unless a bank may have ``slots`` slots."""
        reserved = self.books.page_at.shape[1]
        if slots < self.minimum:
            raise CapacityError(
                f"{slots} slots cannot hold one event of up to {self.minimum} experts",
                fix=f"at least {self.minimum} slots are needed",
            )
        if slots > reserved:
            raise CapacityError(
                f"{slots} slots, but only {reserved} are reserved",
                fix=f"at most {reserved} slots are possible",
            )

    def resize(self, bank: int, slots: int) -> None:
        """Make ``slots`` slots of a bank usable. Pages in slots beyond are given up.

        Call it between events only. ``EventRule.shrink`` first moves the pages worth keeping.

        Raises:
            CapacityError: Too few for one layer, or more than reserved.
        """
        self.require(slots)
        b = self.books
        release_leaving(b)
        for page in b.page_at[bank, slots:].tolist():
            if page != ABSENT:
                unload(b, page)
                b.counts[C_RESIZED] += 1
        free = b.free[bank, : b.num_free[bank]]
        kept = np.sort(free[free < slots])[::-1]
        fresh = np.arange(slots - 1, self.slots[bank] - 1, -1, dtype=np.int32)
        b.num_free[bank] = len(kept) + len(fresh)
        b.free[bank, : b.num_free[bank]] = np.concatenate([fresh, kept])
        self.slots[bank] = b.num_slots[bank] = slots

    # --- checking --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InvariantError unless page↔slot is a bijection and no slot is lost."""
        b = self.books
        experts = self.geometry.experts_per_layer
        for bank, usable in enumerate(self.slots):
            held = np.flatnonzero(b.page_at[bank] != ABSENT)
            free = b.free[bank, : b.num_free[bank]]
            if sorted([*held.tolist(), *free.tolist()]) != list(range(usable)):
                raise InvariantError(f"bank {bank}: slots are lost, doubled or out of range")
            pages = b.page_at[bank, held]
            if np.any(b.slot_of[pages] != held) or np.any(b.bank_of[pages // experts] != bank):
                raise InvariantError(f"bank {bank}: the two directions of the table disagree")
        if np.count_nonzero(self.resident) != np.count_nonzero(b.page_at != ABSENT):
            raise InvariantError("a page is said to be resident but lies in no slot")
        present = np.unpackbits(b.present.view(np.uint8), bitorder="little")
        if np.any(present[: self.geometry.num_pages] != self.resident):
            raise InvariantError("the bits of the resident pages disagree with the table")
        counts = self.counters()
        if counts.hits + counts.misses != counts.accesses:
            raise InvariantError("hits and misses do not add up to accesses")
        if np.any(b.flags[~self.resident] & (PROTECTED | UNUSED)):
            raise InvariantError("an absent page is protected")
