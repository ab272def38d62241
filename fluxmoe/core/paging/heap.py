"""The class ``VictimHeap``: the eviction order of policies with stable scores, kept lazily.

``stable_score`` promises that a page's score changes only when the page is accessed or loaded. So a
hit computes nothing: the page is marked dirty, and dirty pages are scored in one call when victims
are needed. The heap holds *lower bounds*: if a page's score has risen (lru and lfu: at every hit),
the page's entry is outdated, and is corrected only when it reaches the top. A page whose score has
fallen (belady) gets a second entry; the outdated entry is recognised by its key and dropped. In a
tie, the lowest page id is first, because entries are compared as (score, page).

A score above all earlier scores (lru: every score) is appended to a *queue* instead, which stays
sorted at no cost. The next victim is the lower of the first entries of the heap and the queue.
Queue entries become outdated like heap entries.

Most pages are never near the bottom of the order, so the heap of a large bank holds only pages with
scores up to a *limit*. When the heap is empty or has grown too much, a new limit is drawn from a
sample of the bank's pages, and all pages are scanned once. The limit does not affect which victims
are chosen.

Scores are stored as integers in the same order (``as_integer``): a heap spends its time on
comparisons that depend on each other, each of which takes one cycle for integers and six for
floats.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.directory import opener
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.compiled.lowest import before
from fluxmoe.core.paging.books import ABSENT, EVENT, PROTECTED, AnyBooks, Books, open_books
from fluxmoe.core.types import Bools, Int64s

#: The limit is the page of rank _RANK, from 0, among _SAMPLE pages. If a bank holds at most _SMALL
#: pages, all of them may be in the heap.
_SAMPLE, _RANK, _SMALL = 32, 1, 128

#: Key above every score.
NONE = 2**63 - 1

#: Capacity of the queue, in entries per slot.
_QUEUE = 4


class VictimHeap(NamedTuple):
    """Arrays of one heap per bank, for P pages and B banks of M reserved slots.

    Each heap has room for H entries, and each queue for Q entries.
    """

    score: Int64s  # [B, M] latest score of the page in each slot
    bound: Int64s  # [P] key of the page's valid entry; NONE if there is none
    key: Int64s  # [B, H]
    page: Int64s  # [B, H]
    size: Int64s  # [B]
    # [B, Q] the queue, ascending: entries queue_ends[bank, 0] … queue_ends[bank, 1] - 1
    queue_key: Int64s
    queue_page: Int64s
    queue_ends: Int64s  # [B, 2]
    # [B] the limit: every resident page whose (score, page) is not above it has a valid entry in
    # the heap or the queue; heap entries are never above it
    limit: Int64s
    limit_page: Int64s
    chosen: Bools  # [P] removed from the heap while choosing victims
    aside: Int64s  # [P] scratch: chosen pages that must not be evicted
    # scratch: the lowest entries of the sample
    sample: Int64s
    sample_page: Int64s


def new_heap(pages: int, banks: int, slots: int) -> VictimHeap:
    """Make empty heaps for a table of ``pages`` pages with ``banks`` banks of ``slots`` slots."""
    entries = 2 * pages + 1
    return VictimHeap(
        score=np.zeros((banks, slots), np.int64),
        bound=np.full(pages, NONE),
        key=np.zeros((banks, entries), np.int64),
        page=np.zeros((banks, entries), np.int64),
        size=np.zeros(banks, np.int64),
        queue_key=np.zeros((banks, _QUEUE * slots), np.int64),
        queue_page=np.zeros((banks, _QUEUE * slots), np.int64),
        queue_ends=np.zeros((banks, 2), np.int64),
        limit=np.full(banks, NONE),
        limit_page=np.full(banks, pages, np.int64),
        chosen=np.zeros(pages, np.bool_),
        aside=np.zeros(pages, np.int64),
        sample=np.zeros(_RANK + 1, np.int64),
        sample_page=np.zeros(_RANK + 1, np.int64),
    )


#: For compiled code: the directory of a heap → the heap.
open_heap = opener(new_heap(1, 1, 1))
AnyHeap = VictimHeap | Int64s


def clear(heap: VictimHeap) -> None:
    """Empty the heaps and queues of all banks."""
    heap.bound[...] = NONE
    heap.size[...] = 0
    heap.queue_ends[...] = 0
    heap.limit[...] = NONE
    heap.limit_page[...] = len(heap.bound)


@jit
def as_integer(score: float) -> int:
    """Map every float64 except NaN to an int64, keeping the order; 0.0 and −0.0 are equal."""
    bits = np.float64(score + 0.0).view(np.int64)
    # The bits of negative numbers are in descending order.
    return int(bits ^ (bits >> 63 & NONE))


@jit
def update(heaps: AnyHeap, books: AnyBooks, pages: Int64s, scores: npt.NDArray[np.float64]) -> None:
    """Record the scores of resident ``pages``."""
    heap, b = open_heap(heaps), open_books(books)
    for i in range(pages.size):
        page, score = pages[i], as_integer(scores[i])
        bank = b.bank_of[b.layer_of[page]]
        heap.score[bank, b.slot_of[page]] = score
        end = heap.queue_ends[bank, 1] - 1
        if end < heap.queue_ends[bank, 0] or before(
            heap.queue_key[bank, end], heap.queue_page[bank, end], score, page
        ):
            _append(heap, b, bank, page, score)
        # The first condition also holds if ``bound`` is NONE.
        elif heap.bound[page] > score and _within(heap, bank, score, page):
            _push(heap, b, bank, page, score)


@jit
def choose(
    heaps: AnyHeap, books: AnyBooks, bank: int, count: int, protect: bool, out: Int64s
) -> int:
    """Write up to ``count`` victims of ``bank`` to ``out``, lowest score first.

    Pages of the current event are never victims, and protected pages are victims only if
    ``protect`` is false. The victims are removed from the heap; the caller must evict them.

    Returns:
        The number of victims.
    """
    heap, b = open_heap(heaps), open_books(books)
    found = parked = 0
    key, pages = heap.key[bank], heap.page[bank]
    queue_key, queue_page, ends = heap.queue_key[bank], heap.queue_page[bank], heap.queue_ends[bank]
    if heap.size[bank] > _SMALL // 2 + _held(b, bank) // 2:
        _refill(heap, b, bank)
    size, head = heap.size[bank], ends[0]
    while found < count:
        queued = head < ends[1] and (
            size == 0 or before(queue_key[head], queue_page[head], key[0], pages[0])
        )
        if queued:
            bound, page = queue_key[head], queue_page[head]
        else:
            bound, page = key[0], pages[0]
        if (size == 0 and not queued) or not _within(heap, bank, bound, page):
            if heap.limit_page[bank] == heap.bound.size:  # nothing is above the limit
                break
            _refill(heap, b, bank)
            size = heap.size[bank]
            continue
        slot = b.slot_of[page]
        valid = slot != ABSENT and bound == heap.bound[page]
        score = heap.score[bank, slot] if valid else bound
        risen = score > bound and _within(heap, bank, score, page)
        if risen and not queued:
            key[0] = heap.bound[page] = score
            _sift_down(key, pages, size, 0)
            continue
        # Already evicted, superseded by an entry with a lower key, above the limit, or chosen.
        if valid or slot == ABSENT:
            heap.bound[page] = NONE
        chosen = valid and not score > bound
        if queued:
            head += 1
        else:
            size -= 1
            key[0], pages[0] = key[size], pages[size]
            _sift_down(key, pages, size, 0)
        if risen:
            heap.size[bank] = size
            _push(heap, b, bank, page, score)
            size = heap.size[bank]
        if chosen:
            heap.chosen[page] = True
            if b.last_use[page] == b.now[EVENT] or (protect and b.flags[page] & PROTECTED):
                heap.aside[parked] = page
                parked += 1
            else:
                out[found] = page
                found += 1
    heap.size[bank], ends[0] = size, head
    for i in range(found):
        heap.chosen[out[i]] = False
    for i in range(parked):
        page = heap.aside[i]
        heap.chosen[page] = False
        score = heap.score[bank, b.slot_of[page]]
        if _within(heap, bank, score, page):
            _push(heap, b, bank, page, score)
    return found


@jit
def _within(heap: VictimHeap, bank: int, score: int, page: int) -> bool:
    limit = heap.limit[bank]
    return bool(score < limit or (score == limit and page <= heap.limit_page[bank]))


@jit
def _held(b: Books, bank: int) -> int:
    """Return the number of pages that are resident in a bank."""
    return int(b.num_slots[bank] - b.num_free[bank])


@jit
def _refill(heap: VictimHeap, b: Books, bank: int) -> None:
    """Draw a new limit; fill the heap with all pages that are not above it and not in the queue."""
    slots, key, pages = b.num_slots[bank], heap.key[bank], heap.page[bank]
    for i in range(heap.size[bank]):
        if key[i] == heap.bound[pages[i]]:
            heap.bound[pages[i]] = NONE
    heap.limit[bank], heap.limit_page[bank] = NONE, heap.bound.size
    if _held(b, bank) > _SMALL:
        _draw_limit(heap, b, bank, slots)
    size, scores, limit, covered = 0, heap.score[bank], heap.limit[bank], True
    for slot in range(slots):
        if scores[slot] > limit and not covered:
            continue
        page, score = b.page_at[bank, slot], scores[slot]
        if page == ABSENT or heap.chosen[page] or heap.bound[page] == score:
            continue
        if _within(heap, bank, score, page):
            key[size] = heap.bound[page] = score
            pages[size] = page
            size += 1
        else:
            covered = False
    if covered:  # every page is in the heap or the queue
        heap.limit[bank], heap.limit_page[bank] = NONE, heap.bound.size
    heap.size[bank] = size
    for i in range(size // 2 - 1, -1, -1):
        _sift_down(key, pages, size, i)


@jit
def _draw_limit(heap: VictimHeap, b: Books, bank: int, slots: int) -> None:
    """Set the limit to the page of rank ``_RANK`` among the pages in equally spaced slots."""
    n = 0
    for k in range(_SAMPLE):
        slot = k * slots // _SAMPLE
        page, score, i = b.page_at[bank, slot], heap.score[bank, slot], n
        if page == ABSENT or heap.chosen[page]:
            continue
        while i > 0 and before(score, page, heap.sample[i - 1], heap.sample_page[i - 1]):
            i -= 1
            if i < _RANK:
                heap.sample[i + 1], heap.sample_page[i + 1] = heap.sample[i], heap.sample_page[i]
        if i <= _RANK:
            heap.sample[i], heap.sample_page[i] = score, page
            n = min(n + 1, _RANK + 1)
    if n > _RANK:
        heap.limit[bank], heap.limit_page[bank] = heap.sample[_RANK], heap.sample_page[_RANK]


@jit
def _sift_down(key: Int64s, page: Int64s, size: int, top: int) -> None:
    """Restore the heap's order below ``top``.

    The entry at ``top`` first goes down to a leaf, along the lower children, and then up again. It
    nearly always belongs near the bottom, so comparing it on the way down would be wasted work.
    """
    k, p, i, child = key[top], page[top], top, 2 * top + 1
    while child + 1 < size:
        a, b, page_a, page_b = key[child], key[child + 1], page[child], page[child + 1]
        child += (b < a) | ((b == a) & (page_b < page_a))
        key[i], page[i] = key[child], page[child]
        i, child = child, 2 * child + 1
    if child < size:
        key[i], page[i] = key[child], page[child]
        i = child
    while i > top and before(k, p, key[(i - 1) // 2], page[(i - 1) // 2]):
        key[i], page[i] = key[(i - 1) // 2], page[(i - 1) // 2]
        i = (i - 1) // 2
    key[i], page[i] = k, p


@jit
def _push(heap: VictimHeap, b: Books, bank: int, page: int, score: int) -> None:
    if heap.size[bank] == heap.key.shape[1]:
        _compact(heap, b, bank)
    key, pages, i = heap.key[bank], heap.page[bank], heap.size[bank]
    heap.bound[page] = score
    heap.size[bank] += 1
    while i > 0 and before(score, page, key[(i - 1) // 2], pages[(i - 1) // 2]):
        key[i], pages[i] = key[(i - 1) // 2], pages[(i - 1) // 2]
        i = (i - 1) // 2
    key[i], pages[i] = score, page


@jit
def _append(heap: VictimHeap, b: Books, bank: int, page: int, score: int) -> None:
    """Append an entry to the queue; if the queue is full, drop outdated entries first."""
    keys, pages, ends = heap.queue_key[bank], heap.queue_page[bank], heap.queue_ends[bank]
    if ends[1] == keys.size:
        kept = 0
        for i in range(ends[0], ends[1]):
            if keys[i] != heap.bound[pages[i]]:
                continue
            if b.slot_of[pages[i]] == ABSENT:
                heap.bound[pages[i]] = NONE
            else:
                keys[kept], pages[kept] = keys[i], pages[i]
                kept += 1
        ends[0], ends[1] = 0, kept
    keys[ends[1]], pages[ends[1]] = score, page
    heap.bound[page] = score
    ends[1] += 1


@jit
def _compact(heap: VictimHeap, b: Books, bank: int) -> None:
    """Drop outdated entries. At most one entry per page remains, so there is room for another."""
    kept = 0
    for i in range(heap.size[bank]):
        page = heap.page[bank, i]
        if heap.key[bank, i] == heap.bound[page]:
            heap.bound[page] = NONE  # invalidates a second entry with the same key
            if b.slot_of[page] != ABSENT:
                heap.key[bank, kept], heap.page[bank, kept] = heap.key[bank, i], page
                kept += 1
    heap.size[bank] = kept
    for i in range(kept):
        heap.bound[heap.page[bank, i]] = heap.key[bank, i]
    for i in range(kept // 2 - 1, -1, -1):
        _sift_down(heap.key[bank], heap.page[bank], kept, i)
