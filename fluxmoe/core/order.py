"""VictimHeap: the eviction order of policies with stable scores, kept lazily.

``stable_score`` promises that a page's score changes only when the page is accessed or loaded.
So nothing is computed on a hit: the page is marked dirty, and only when victims are needed are the
dirty pages scored, in one call. The heap holds *lower bounds*: a page's entry may lag behind when
its score has risen (lru, lfu: every hit), and is put right only if it comes to the top. A score
that fell (belady) gets a second entry; the outdated one is recognised by its key and dropped.
Ties go to the lowest page id, because entries compare as (score, page).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fluxmoe.core.jit import jit
from fluxmoe.core.pages import ABSENT, EVENT, PROTECTED, Books
from fluxmoe.core.types import Int64s


class VictimHeap(NamedTuple):
    """Arrays of a heap per bank. P pages, B banks, H entries."""

    score: npt.NDArray[np.float64]  # [P] the latest score
    bound: npt.NDArray[np.float64]  # [P] key of the page's valid entry; nan = it has none
    key: npt.NDArray[np.float64]  # [B, H]
    page: Int64s  # [B, H]
    size: Int64s  # [B]
    aside: Int64s  # [P] scratch


def new_heap(pages: int, banks: int) -> VictimHeap:
    """An empty heap for a table of ``pages`` pages."""
    entries = 2 * pages + 1
    return VictimHeap(
        score=np.zeros(pages),
        bound=np.full(pages, np.nan),
        key=np.zeros((banks, entries)),
        page=np.zeros((banks, entries), np.int64),
        size=np.zeros(banks, np.int64),
        aside=np.zeros(pages, np.int64),
    )


def clear(heap: VictimHeap) -> None:
    """Make the heap empty."""
    heap.bound[...] = np.nan
    heap.size[...] = 0


@jit
def update(heap: VictimHeap, b: Books, pages: Int64s, scores: npt.NDArray[np.float64]) -> None:
    """Note the scores of resident ``pages``."""
    for i in range(pages.size):
        page = pages[i]
        heap.score[page] = scores[i]
        if not heap.bound[page] <= scores[i]:  # also true where bound is nan
            _push(heap, b, b.bank_of[page // b.tokens.size], page)


@jit
def choose(heap: VictimHeap, b: Books, bank: int, count: int, protect: bool, out: Int64s) -> int:
    """Write up to ``count`` victims of ``bank`` into ``out``, lowest score first; how many.

    The running event's pages are never victims, protected ones only if ``protect`` is false.
    Victims leave the heap; the caller must evict them.
    """
    found = parked = 0
    while found < count and heap.size[bank] > 0:
        key, page = heap.key[bank, 0], heap.page[bank, 0]
        if b.slot_of[page] == ABSENT or key != heap.bound[page]:
            _pop(heap, bank)  # evicted since, or outdated by an entry with a lower key
            if b.slot_of[page] == ABSENT:
                heap.bound[page] = np.nan
        elif heap.score[page] > key:
            heap.key[bank, 0] = heap.bound[page] = heap.score[page]
            _sift_down(heap, bank, 0)
        else:
            _pop(heap, bank)
            heap.bound[page] = np.nan
            if b.last_use[page] == b.now[EVENT] or (protect and b.flags[page] & PROTECTED):
                heap.aside[parked] = page
                parked += 1
            else:
                out[found] = page
                found += 1
    for i in range(parked):
        _push(heap, b, bank, heap.aside[i])
    return found


@jit
def _less(heap: VictimHeap, bank: int, i: int, j: int) -> bool:
    a, b = heap.key[bank, i], heap.key[bank, j]
    return bool(a < b or (a == b and heap.page[bank, i] < heap.page[bank, j]))


@jit
def _swap(heap: VictimHeap, bank: int, i: int, j: int) -> None:
    heap.key[bank, i], heap.key[bank, j] = heap.key[bank, j], heap.key[bank, i]
    heap.page[bank, i], heap.page[bank, j] = heap.page[bank, j], heap.page[bank, i]


@jit
def _sift_down(heap: VictimHeap, bank: int, i: int) -> None:
    size = heap.size[bank]
    while True:
        child = 2 * i + 1
        if child >= size:
            return
        if child + 1 < size and _less(heap, bank, child + 1, child):
            child += 1
        if not _less(heap, bank, child, i):
            return
        _swap(heap, bank, i, child)
        i = child


@jit
def _pop(heap: VictimHeap, bank: int) -> None:
    heap.size[bank] -= 1
    _swap(heap, bank, 0, heap.size[bank])
    _sift_down(heap, bank, 0)


@jit
def _push(heap: VictimHeap, b: Books, bank: int, page: int) -> None:
    if heap.size[bank] == heap.key.shape[1]:
        _compact(heap, b, bank)
    heap.bound[page] = heap.score[page]
    i = heap.size[bank]
    heap.key[bank, i], heap.page[bank, i] = heap.score[page], page
    heap.size[bank] += 1
    while i > 0 and _less(heap, bank, i, (i - 1) // 2):
        _swap(heap, bank, i, (i - 1) // 2)
        i = (i - 1) // 2


@jit
def _compact(heap: VictimHeap, b: Books, bank: int) -> None:
    """Drop the outdated entries: at most one per page remains, so there is room for one more."""
    kept = 0
    for i in range(heap.size[bank]):
        page = heap.page[bank, i]
        if heap.key[bank, i] == heap.bound[page]:
            heap.bound[page] = np.nan  # a second entry with the same key is no longer valid
            if b.slot_of[page] != ABSENT:
                heap.key[bank, kept], heap.page[bank, kept] = heap.key[bank, i], page
                kept += 1
    heap.size[bank] = kept
    for i in range(kept):
        heap.bound[heap.page[bank, i]] = heap.key[bank, i]
    for i in range(kept // 2 - 1, -1, -1):
        _sift_down(heap, bank, i)
