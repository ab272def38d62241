"""Compiled functions for the points of the event rule (docs/concepts/event-rule.md)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.compiled.lowest import lowest_bit
from fluxmoe.core.paging.books import (
    ABSENT,
    C_ACCESSES,
    C_COLD,
    C_EVENTS,
    C_EVICTIONS,
    C_HITS,
    C_LOADS_DEMAND,
    C_LOADS_PREFETCH,
    C_MISSES,
    C_PREFETCH_HITS,
    EVENT,
    LAYER,
    LOADED,
    MISSES,
    NEVER,
    PAGES,
    PROTECTED,
    RELOADED,
    STEP,
    UNUSED,
    AnyBooks,
    Books,
    bit,
    load,
    mark_dirty,
    note,
    open_books,
    release_leaving,
    unload,
)
from fluxmoe.core.types import Int64s, Ints

Slots = npt.NDArray[np.int32]


@jit
def open_event(books: AnyBooks, step: int, layer: int, ids: Ints, slots: Slots) -> int:
    """Apply points 1–3 and 6: unload the last event's leaving pages, and count hits and misses.

    Args:
        books: The books, or their directory.
        step: Number of the engine's forward pass, from 0.
        layer: Number of the MoE layer, from 0.
        ids: Routed experts, 1-D, repeats allowed; negative entries are padding.
        slots: Filled with the slot of each entry of ``ids`` if there is no miss; may be empty.

    Returns:
        The number of misses.

    Raises:
        IndexError: The layer or an expert does not exist, or ``slots`` is neither empty nor as long
            as ``ids``; the event has not begun.
    """
    b = open_books(books)
    experts = b.tokens.size
    first = layer * experts
    # Compiled code does not check indices, so a wrong one would overwrite unrelated memory.
    if layer < 0 or layer >= b.bank_of.size:
        raise IndexError("no such MoE layer")
    if slots.size != 0 and slots.size != ids.size:
        raise IndexError("as many slots as expert ids are needed")
    for i in range(ids.size):
        if ids[i] >= experts:
            raise IndexError("an expert id is beyond the layer's experts")
    for i in range(ids.size):
        if ids[i] >= 0:
            b.routed[ids[i]] += 1
            b.asked[ids[i] >> 6] |= bit(ids[i])

    release_leaving(b)
    b.now[LOADED] = b.now[RELOADED] = 0
    b.now[EVENT] += 1
    b.now[STEP], b.now[LAYER] = step, layer
    event = b.now[EVENT]
    for page in range(first, first + experts):
        b.flags[page] &= ~np.uint8(PROTECTED)
    n = misses = 0
    for word in range(b.asked.size):
        asked, b.asked[word] = b.asked[word], 0
        while asked != 0:
            expert = 64 * word + lowest_bit(asked)
            asked &= asked - np.uint64(1)
            page = first + expert
            hit = b.slot_of[page] != ABSENT
            b.pages[n], b.tokens[n], b.hit[n] = page, b.routed[expert], hit
            b.routed[expert] = 0
            n += 1
            if not hit:
                b.missing[misses] = page
                misses += 1
                if b.loaded_at[page] == NEVER:
                    b.counts[C_COLD] += 1
            elif b.flags[page] & UNUSED:
                b.counts[C_PREFETCH_HITS] += 1
                b.flags[page] &= ~np.uint8(UNUSED)
            b.last_use[page] = event
            b.use_count[page] += 1
            mark_dirty(b, page)
    b.now[PAGES], b.now[MISSES] = n, misses
    note(b, b.pages, n)
    b.counts[C_EVENTS] += 1
    b.counts[C_ACCESSES] += n
    b.counts[C_HITS] += n - misses
    b.counts[C_MISSES] += misses
    if misses == 0:
        lookup(b, layer, ids, slots)
    return misses


@jit
def lookup(books: AnyBooks, layer: int, ids: Ints, slots: Slots) -> None:
    """Set ``slots[i]`` to the slot of expert ``ids[i]``, or to 0 for padding."""
    b = open_books(books)
    first = layer * b.tokens.size
    for i in range(slots.size):
        slots[i] = b.slot_of[first + ids[i]] if ids[i] >= 0 else 0


@jit
def evict(books: AnyBooks, victims: Int64s, counter: int) -> None:
    """Free the slots of ``victims``, and count the victims in ``counts[counter]``."""
    b = open_books(books)
    for i in range(victims.size):
        unload(b, victims[i])
    b.counts[counter] += victims.size


@jit
def load_missing(books: AnyBooks) -> None:
    """Apply point 5: assign slots to the event's misses, in ascending order of pages."""
    b = open_books(books)
    for i in range(b.now[MISSES]):
        load(b, b.missing[i])
    note(b, b.missing, b.now[MISSES])
    b.counts[C_LOADS_DEMAND] += b.now[MISSES]


@jit
def admit(b: Books, victims: Int64s) -> None:
    """Apply points 4 and 5, given the victims: free their slots, then load the misses."""
    evict(b, victims, C_EVICTIONS)
    load_missing(b)


@jit
def load_ahead(books: AnyBooks, pages: Int64s) -> None:
    """Apply point 7: assign slots to prefetched pages in order of urgency, and protect them."""
    b = open_books(books)
    for i in range(pages.size):
        load(b, pages[i])
        b.flags[pages[i]] |= np.uint8(PROTECTED | UNUSED)
    note(b, pages, pages.size)
    b.counts[C_LOADS_PREFETCH] += pages.size


@jit
def candidates(books: AnyBooks, bank: int, protect: bool, out: Int64s) -> int:
    """Write a bank's evictable pages into ``out``, in ascending order; return their number.

    ``victims`` and ``heap`` use the same condition.
    """
    b = open_books(books)
    n, banks = 0, b.num_slots.size
    for word in range(b.present.size):
        present = b.present[word]
        while present != 0:
            page = 64 * word + lowest_bit(present)
            present &= present - np.uint64(1)
            if (
                b.last_use[page] != b.now[EVENT]
                and not (protect and b.flags[page] & PROTECTED)
                and (banks == 1 or b.bank_of[b.layer_of[page]] == bank)
            ):
                out[n] = page
                n += 1
    return n
