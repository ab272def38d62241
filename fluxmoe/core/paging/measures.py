"""Page statistics while serving: the miss-ratio curve, and page ages.

``MissRatioCurve`` estimates the miss ratio for any number of slots.

LRU has the inclusion property: with ``k`` slots, it holds the ``k`` most recently used pages. So an
access to a page hits if fewer than ``k`` other pages have been used since that page's last use
(Mattson, 1970). The usual estimators sample *pages* and keep a stack of them (SHARDS, Waldspurger
2015). Here, the books already record every page's last use. So *events* are sampled, and one pass
over the books counts the stack distances of an event's pages. The result is exact for each sampled
event, and other events need no work.

The stack has the order of the event rule: by last event, then by page id, because among equal pages
the lowest id is evicted first. The distances of an event's pages are those at the event's start.

``PageAges`` counts page ages for display. The ages are counted where an engine evicts pages, not in
the compiled event rule, which a simulator runs millions of times.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.directory import directory
from fluxmoe.core.compiled.jit import jit, jit_allocating
from fluxmoe.core.paging.books import EVENT, NEVER, Books, open_books
from fluxmoe.core.types import AGES, IDLE, LIFETIME, REUSE, Int64s, Ints

Floats = npt.NDArray[np.float64]

#: Number of samples after which the weight of a sample has decayed to 1/e.
WINDOW = 32


@jit_allocating
def sample(
    last_use: Int64s,
    first: int,
    ids: Ints,
    seen: Int64s,
    keys: Int64s,
    histogram: Floats,
    weight: float,
) -> None:
    """Add the stack distances of an event that has not begun yet to a histogram.

    Args:
        last_use: The last event that used each page; −1 means never.
        first: First page of the layer.
        ids: Routed experts, 1-D; repeats and padding (negative entries) are allowed.
        seen: Scratch ``[experts]``.
        keys: Scratch ``[experts]``.
        histogram: Weights by distance, ``[pages + 1]``; the last entry is for first uses.
        weight: Amount to add for each distinct page.
    """
    pages, experts = last_use.size, seen.size
    seen[:] = 0
    n = 0
    for i in range(ids.size):
        expert = ids[i]
        if 0 <= expert < experts and seen[expert] == 0:
            seen[expert] = 1
            page = first + expert
            if last_use[page] == NEVER:
                histogram[pages] += weight
            else:
                keys[n] = last_use[page] * pages + page
                n += 1
    if n == 0:
        return
    for i in range(1, n):  # insertion sort: n is small, and nothing is allocated
        key, at = keys[i], i
        while at > 0 and keys[at - 1] > key:
            keys[at] = keys[at - 1]
            at -= 1
        keys[at] = key
    seen[:] = 0  # from here on: seen[i] counts the pages with keys between keys[i] and the next
    for page in range(pages):
        key = last_use[page] * pages + page
        if key > keys[0]:  # in a large model, most pages are older and need no search
            low, high = 0, n
            while low + 1 < high:
                middle = (low + high) // 2
                if keys[middle] < key:
                    low = middle
                else:
                    high = middle
            seen[low] += 1
    above = 0
    for i in range(n - 1, -1, -1):
        above += seen[i]
        histogram[above] += weight


class MissRatioCurve:
    """Estimate of LRU's miss ratio as a function of the number of slots, over the recent past.

    Args:
        pages: Number of pages of the model.
        experts: Number of experts per layer.
        every: Average number of events from one sample to the next; 1 samples all events. With
            the default, sampling costs less than a microsecond per event.
        window: Number of samples after which the weight of a sample has decayed to 1/e; with 0,
            weights do not decay.
        seed: Seed of the random intervals between samples, which avoid a bias towards some layers.
    """

    def __init__(
        self,
        pages: int,
        experts: int,
        *,
        every: int | None = None,
        window: int = WINDOW,
        seed: int = 0,
    ) -> None:
        self._pages = pages
        self._every = max(4, pages // 48) if every is None else every
        self._growth = 1.0 + 1.0 / window if window else 1.0
        self._random = random.Random(seed)
        self._seen = np.zeros(experts, np.int64)
        self._keys = np.zeros(experts, np.int64)
        self._histogram = np.zeros(pages + 1)  # by distance; the last entry counts first uses
        self.reset()

    def reset(self) -> None:
        """Clear all samples."""
        self._histogram[:] = 0.0
        self._weight = 1.0
        self._wait = 0

    def observe(self, last_use: Int64s, layer: int, ids: Ints) -> None:
        """Sample an event that has not begun yet, or skip the event."""
        if self._wait:
            self._wait -= 1
            return
        self._wait = self._random.randrange(2 * self._every - 1)
        first = layer * self._seen.size
        sample(last_use, first, ids, self._seen, self._keys, self._histogram, self._weight)
        self._weight *= self._growth
        if self._weight > 1e12:
            self._histogram /= self._weight
            self._weight = 1.0

    def curve(self) -> Floats:
        """Return the miss ratios for 0, 1 … ``pages`` slots, without misses at first uses.

        The ratios do not increase. Before the first sample, all of them are 0.
        """
        total = self._histogram.sum()
        misses = np.zeros(self._pages + 1)
        misses[:-1] = np.cumsum(self._histogram[:-1][::-1])[::-1]
        return misses / total if total else misses

    @property
    def first_uses(self) -> float:
        """Share of accesses that were the first use of a page."""
        total = self._histogram.sum()
        return float(self._histogram[-1] / total) if total else 0.0


@jit_allocating
def convex_hull(curve: Floats) -> Floats:
    """Compute the lower convex hull of a miss-ratio curve.

    LRU's curve can have a cliff: if every step uses all pages, all accesses miss unless all pages
    fit. A better policy keeps a fixed part of the pages; such policies can reach every point of the
    hull (Talus, Beckmann and Sanchez, 2015).
    """
    hull = np.zeros(curve.size)
    corners, n = np.zeros(curve.size, np.int64), 0
    for k in range(curve.size):
        # Drop corners on or above the line from their predecessor to this point.
        while n > 1:
            i, j = corners[n - 2], corners[n - 1]
            if (curve[j] - curve[i]) * (k - i) < (curve[k] - curve[i]) * (j - i):
                break
            n -= 1
        corners[n] = k
        n += 1
    for corner in range(1, n):
        i, j = corners[corner - 1], corners[corner]
        for k in range(i, j):
            hull[k] = curve[i] + (curve[j] - curve[i]) * (k - i) / (j - i)
    if n:
        hull[corners[n - 1]] = curve[corners[n - 1]]
    return hull


#: Reuse is sampled once in this many events; the number is prime, so no layer is preferred.
REUSE_EVERY = 61


class PageAges:
    """Counts of page ages since the last reset.

    Args:
        books: The books of the pages.

    Attributes:
        counts: Number of ages by kind and bucket, int64 ``[3, AGES]``.
        sums: Sum of the ages by kind, in events, int64 ``[3]``.
    """

    def __init__(self, books: Books) -> None:
        self._books, self._directory = books, directory(books)
        self.counts = np.zeros((3, AGES), np.int64)
        self.sums = np.zeros(3, np.int64)
        self.leave(np.zeros(0, np.int64))  # compile or load the function before any event

    def reset(self) -> None:
        """Clear all counts."""
        self.counts[:] = self.sums[:] = 0

    def routed(self, layer: int, ids: Ints) -> None:
        """Count the reuse of pages by an event that has not begun yet, if the event is sampled."""
        b = self._books
        event = int(b.now[EVENT]) + 1
        if event % REUSE_EVERY == 0:
            last = b.last_use[np.unique(ids[ids >= 0]) + layer * b.tokens.size]
            for age in (event - last[last != NEVER]).tolist():
                _note(self.counts, self.sums, REUSE, age)

    def leave(self, pages: Int64s) -> None:
        """Count the ages of ``pages``, which are about to be evicted."""
        _note_leaving(self._directory, pages, self.counts, self.sums)


@jit
def _note_leaving(books: Int64s, pages: Int64s, counts: Int64s, sums: Int64s) -> None:
    b = open_books(books)
    event = b.now[EVENT]
    for i in range(pages.size):
        page = pages[i]
        loaded = b.loaded_at[page]
        _note(counts, sums, LIFETIME, event - loaded)
        # A page that was prefetched and never used has been idle since it was loaded.
        _note(counts, sums, IDLE, event - max(b.last_use[page], loaded))


@jit
def _note(counts: Int64s, sums: Int64s, kind: int, age: int) -> None:
    bucket = 0
    while bucket < AGES - 1 and age > 1 << bucket:
        bucket += 1
    counts[kind, bucket] += 1
    sums[kind] += age
