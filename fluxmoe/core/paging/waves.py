"""Waves: the order in which the tokens of an event run if its bank has too few slots for all pages.

An event may need more distinct pages than its bank has slots. The event's tokens then run in
*waves*, one wave after another; the pages of a wave fit into the slots. A token is never split, so
the sums over a token's experts are computed in the usual order. The waves depend only on the routed
experts and on the number of slots, so that an engine and a simulation agree.

Let *k* be the largest number of experts of a token, *A* the number of (token, expert) pairs, *n*
the number of distinct pages, *S* the number of slots, and ``R = S - k``. ``partition`` simulates a
bank that is empty at first, and orders the tokens one by one:

* The next token is the one that lacks the fewest pages; among equals, the first. Therefore all
  tokens whose pages are present run before another page is loaded.
* If a page must be evicted, the *R* pages that the most tokens use are spared unless no remaining
  token needs them. Pages that the current wave does not use are evicted first; among these, pages
  that no remaining token needs, and then pages that the fewest tokens use; among equals, the page
  with the lowest number.
* A wave ends before the first token for which one of the wave's pages must be evicted.

Bound: an event loads at most ``min(A, R + A * (n - R) // n)`` pages. Proof: if a page must be
evicted, at least *R + 1* of the resident pages are not used by the token, so one of them is not
among the *R* most used pages. These *R* pages are loaded at most once, and account for at least a
share *R / n* of *A*. Each remaining pair causes at most one load. ``place`` begins with the pages
in the bank, and evicts the page whose next use is furthest away (Belady, 1966), so it does not load
more pages than the simulation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.jit import jit, jit_allocating
from fluxmoe.core.compiled.lowest import lowest_bit
from fluxmoe.core.paging.books import (
    ABSENT,
    C_EVICTIONS,
    C_LOADS_DEMAND,
    C_RELOADS,
    EVENT,
    LAYER,
    LOADED,
    MISSES,
    PAGES,
    RELOADED,
    AnyBooks,
    Books,
    bit,
    load,
    note,
    open_books,
    unload,
)
from fluxmoe.core.paging.event import Slots
from fluxmoe.core.types import Bools, Int64s, Loads, Wave
from fluxmoe.errors import CapacityError

Words = npt.NDArray[np.uint64]

# Added to the need of an expert: KEPT for the most used experts, which are spared, and IN_WAVE for
# the wave's other experts, which are evicted only if no expert outside the wave can be evicted.
KEPT, IN_WAVE = 1 << 60, 1 << 40


class Waves(NamedTuple):
    """The W waves of T tokens. If a token needs more pages than there are slots, W is 0.

    Attributes:
        order: All tokens, wave by wave, int64 ``[T]``.
        ends: Index in ``order`` after the last token of each wave, int64 ``[W]``.
        experts: Distinct experts of each wave, wave by wave, int64.
        expert_ends: Index in ``experts`` after the last expert of each wave, int64 ``[W]``.
    """

    order: Int64s
    ends: Int64s
    experts: Int64s
    expert_ends: Int64s


class Placed(NamedTuple):
    """The L loads of W waves, wave by wave.

    Attributes:
        pages: Pages to load, int64 ``[L]``.
        slots: Slot of each page, int64 ``[L]``.
        ends: Index after the last load of each wave, int64 ``[W]``.
    """

    pages: Int64s
    slots: Int64s
    ends: Int64s


def most_loads(pairs: int, pages: int, top_k: int, slots: int) -> int:
    """Compute the bound on the loads of an event (see the module's docstring).

    Args:
        pairs: Number of (token, expert) pairs.
        pages: Number of distinct pages.
        top_k: Largest number of experts of a token.
        slots: Number of slots of the bank, at least ``top_k``.

    Returns:
        The maximum number of pages that the event loads.
    """
    if pages <= slots:
        return pages
    kept = slots - top_k
    return min(pairs, kept + pairs * (pages - kept) // pages)


def divide(ids: Int64s, starts: Bools, experts: int, slots: int) -> Waves:
    """Divide an event's tokens into waves. For the arguments, see ``partition``.

    Raises:
        CapacityError: A token needs more than ``slots`` slots.
    """
    waves = partition(ids, starts, experts, slots)
    if not len(waves.ends):
        what = f"the experts of one token do not fit into {slots} slots"
        raise CapacityError(what, fix="give the experts more memory")
    return waves


def in_order(bank: int, waves: Waves, placed: Placed) -> list[Wave]:
    """List the waves, each with its tokens and its loads into a bank."""
    found, first, last = [], 0, 0
    for end, load_end in zip(waves.ends.tolist(), placed.ends.tolist(), strict=True):
        loads = Loads(bank, placed.pages[last:load_end], placed.slots[last:load_end])
        found.append(Wave(waves.order[first:end], loads))
        first, last = end, load_end
    return found


@jit_allocating
def partition(ids: Int64s, starts: Bools, experts: int, slots: int) -> Waves:
    """Order the tokens of an event, and divide them into waves.

    Args:
        ids: Routed experts of all tokens, int64 ``[N]``, each below ``experts``; negative entries
            are padding, which needs no page.
        starts: bool ``[N]``, True where a token begins. The first entry always begins a token.
        experts: Number of experts of the layer.
        slots: Number of slots of the layer's bank.

    Returns:
        The waves; no waves if a token needs more than ``slots`` slots.
    """
    # ``of[first[t] : first[t + 1]]`` are the distinct experts of token t.
    first = np.zeros(ids.size + 1, np.int64)
    of = np.empty(ids.size, np.int64)
    mine = np.full(experts, -1, np.int64)  # the last token seen that uses each expert
    uses = np.zeros(experts, np.int64)
    tokens = pairs = most = 0
    for i in range(ids.size):
        if starts[i] or i == 0:
            first[tokens] = pairs
            tokens += 1
        expert = ids[i]
        if expert >= 0 and mine[expert] != tokens:
            mine[expert] = tokens
            of[pairs] = expert
            uses[expert] += 1
            pairs += 1
            most = max(most, pairs - first[tokens - 1])
    first[tokens] = pairs
    order, ends = np.empty(tokens, np.int64), np.zeros(tokens, np.int64)
    wanted, wanted_ends = np.empty(pairs, np.int64), np.zeros(tokens, np.int64)
    if most > slots:
        return Waves(order[:0], ends[:0], wanted[:0], wanted_ends[:0])

    # ``users[begins[e] : begins[e + 1]]`` are the tokens that use expert e.
    begins = np.zeros(experts + 1, np.int64)
    for expert in range(experts):
        begins[expert + 1] = begins[expert] + uses[expert]
    users, filled = np.empty(pairs, np.int64), begins.copy()
    # waiting[n] has one bit for each waiting token that lacks n pages; counts[n] is their number.
    lacks = np.zeros(tokens, np.int64)
    waiting, counts = (
        np.zeros((most + 1, (tokens + 63) >> 6), np.uint64),
        np.zeros(most + 1, np.int64),
    )
    for token in range(tokens):
        for i in range(first[token], first[token + 1]):
            users[filled[of[i]]] = token
            filled[of[i]] += 1
        lacks[token] = first[token + 1] - first[token]
        waiting[lacks[token], token >> 6] |= bit(token)
        counts[lacks[token]] += 1

    needs = uses.copy()
    needs[np.argsort(-uses, kind="mergesort")[: slots - most]] += KEPT
    left = uses.copy()  # waiting tokens per expert
    held = np.zeros(experts, np.bool_)
    last = np.full(experts, -1, np.int64)  # the last wave that uses each expert
    mine[:] = -1
    free, waves, found = slots, 0, 0
    for done in range(tokens):
        lack = 0
        while counts[lack] == 0:
            lack += 1
        word = 0
        while waiting[lack, word] == 0:
            word += 1
        token = 64 * word + lowest_bit(waiting[lack, word])
        waiting[lack, word] &= ~bit(token)
        counts[lack] -= 1
        lacks[token] = -1
        for i in range(first[token], first[token + 1]):
            mine[of[i]] = token
            left[of[i]] -= 1
        over = False
        for i in range(first[token], first[token + 1]):
            if held[of[i]]:
                continue
            if free == 0:
                victim = _least_needed(held, mine, token, needs, left, last, waves)
                over |= last[victim] == waves
                held[victim] = False
                free += 1
                _move(users, begins[victim], begins[victim + 1], 1, lacks, waiting, counts)
            held[of[i]] = True
            free -= 1
            _move(users, begins[of[i]], begins[of[i] + 1], -1, lacks, waiting, counts)
        waves += over
        for i in range(first[token], first[token + 1]):
            if last[of[i]] != waves:
                last[of[i]] = waves
                wanted[found] = of[i]
                found += 1
        order[done] = token
        ends[waves], wanted_ends[waves] = done + 1, found
    count = min(tokens, waves + 1)
    return Waves(order, ends[:count], wanted[:found], wanted_ends[:count])


@jit
def _least_needed(
    held: Bools, mine: Int64s, token: int, needs: Int64s, left: Int64s, last: Int64s, wave: int
) -> int:
    """Return the expert to evict: one that is held and not used by ``token``."""
    victim, least = -1, 0
    for expert in range(held.size):
        if not held[expert] or mine[expert] == token:
            continue
        need = needs[expert] if left[expert] else 0
        if last[expert] == wave and need < KEPT:
            need += IN_WAVE
        if victim < 0 or need < least:
            victim, least = expert, need
    return victim


@jit
def _move(
    users: Int64s, begin: int, end: int, by: int, lacks: Int64s, waiting: Words, counts: Int64s
) -> None:
    """Add ``by`` to the number of pages that the waiting tokens of ``users[begin:end]`` lack."""
    for i in range(begin, end):
        token = users[i]
        lack = lacks[token]
        if lack >= 0:
            waiting[lack, token >> 6] &= ~bit(token)
            counts[lack] -= 1
            lacks[token] = lack + by
            waiting[lack + by, token >> 6] |= bit(token)
            counts[lack + by] += 1


@jit_allocating
def place(books: AnyBooks, waves: Waves, ids: Int64s, starts: Bools, slots: Slots) -> Placed:
    """Assign slots to the pages of the open event, wave by wave.

    The bank may hold only pages of the event. The loads of a wave are in ascending order of page
    numbers. If no slot is free, the page of the event whose next use is furthest away is evicted;
    among equals, the page with the lowest number. Each victim counts as an eviction, and a further
    load of the same page counts as a reload.

    Args:
        books: The books, or their directory.
        waves: The event's waves for the number of slots of its bank.
        ids, starts: The arguments of ``partition``.
        slots: Filled with the slot of each entry of ``ids`` during the wave of the entry's token;
            0 for padding; int32, as long as ``ids``, or empty.

    Returns:
        The loads of each wave.
    """
    b = open_books(books)
    layer, event, count = b.now[LAYER], b.now[EVENT], b.now[PAGES]
    first, bank = layer * b.tokens.size, b.bank_of[layer]
    total, never = waves.experts.size, waves.ends.size
    soon = np.full(b.tokens.size, never, np.int64)  # the next wave that uses each expert
    later = np.empty(total, np.int64)  # the wave that uses each entry of waves.experts next
    end = total
    for wave in range(never - 1, -1, -1):
        begin = waves.expert_ends[wave - 1] if wave else 0
        for i in range(begin, end):
            later[i] = soon[waves.experts[i]]
            soon[waves.experts[i]] = wave
        end = begin
    entries, tokens = np.zeros(ids.size + 1, np.int64), 0
    for i in range(ids.size):
        if starts[i] or i == 0:
            entries[tokens] = i
            tokens += 1
    entries[tokens] = ids.size
    pages, targets = np.empty(total, np.int64), np.empty(total, np.int64)
    ends = np.zeros(never, np.int64)
    loads = begin = begin_token = 0
    for wave in range(never):
        b.now[LOADED] = 0
        for i in range(count):
            page = b.pages[i]
            if soon[page - first] != wave or b.slot_of[page] != ABSENT:
                continue
            if b.num_free[bank] == 0:
                unload(b, _latest(b, soon, first, wave))
                b.counts[C_EVICTIONS] += 1
            b.now[RELOADED] += b.hit[i] or b.loaded_at[page] == event
            load(b, page)
            pages[loads], targets[loads] = page, b.slot_of[page]
            loads += 1
        ends[wave] = loads
        if slots.size != 0:
            for k in range(begin_token, waves.ends[wave]):
                token = waves.order[k]
                for i in range(entries[token], entries[token + 1]):
                    slots[i] = b.slot_of[first + ids[i]] if ids[i] >= 0 else 0
        for i in range(begin, waves.expert_ends[wave]):
            soon[waves.experts[i]] = later[i]
        begin, begin_token = waves.expert_ends[wave], waves.ends[wave]
    note(b, b.pages, count)
    b.counts[C_LOADS_DEMAND] += b.now[MISSES]
    b.counts[C_RELOADS] += b.now[RELOADED]
    return Placed(pages[:loads], targets[:loads], ends)


@jit
def _latest(b: Books, soon: Int64s, first: int, wave: int) -> int:
    """Return the event's resident page, not used by this wave, whose next use is furthest away."""
    victim, when = -1, -1
    for i in range(b.now[PAGES]):
        page = b.pages[i]
        if b.slot_of[page] != ABSENT and soon[page - first] != wave and soon[page - first] > when:
            victim, when = page, soon[page - first]
    return victim
