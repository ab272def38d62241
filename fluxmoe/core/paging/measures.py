"""Page statistics while serving: the miss-ratio curve, and page ages.

``MissRatioCurve`` estimates the miss ratio for any number of slots.

LRU has the inclusion property: with ``k`` slots it holds the ``k`` most recently used pages, so an
access hits if fewer than ``k`` other pages were used since (Mattson, 1970). The usual estimators
sample *pages* and keep a stack of them (SHARDS, Waldspurger 2015). The books already record every
page's last use, so *events* are sampled here, and one pass over the books counts the stack
distances of their pages: exact for each sampled event, with no work for the others.

The stack is ordered as in the event rule: by last event, then by page id, because ties are evicted
lowest id first. The distances of all pages of an event are those at its beginning.

``PageAges`` are for display. They are counted where an engine evicts, not in the event rule, which
a simulator runs millions of times.
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

#: Sampled events after which the weight of older ones has decayed to 1/e.
WINDOW = 32
_NEVER = -1


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
        last_use: The last event that used each page, −1 = never.
        first: First page of the layer.
        ids: Routed experts, 1-D, repeats and padding (negative) allowed.
        seen: Scratch ``[experts]``.
        keys: Scratch ``[experts]``.
        histogram: ``[pages + 1]`` by distance; the last entry is for first uses.
        weight: Amount added per distinct page.
    """
    pages, experts = last_use.size, seen.size
    seen[:] = 0
    n = 0
    for i in range(ids.size):
        expert = ids[i]
        if 0 <= expert < experts and seen[expert] == 0:
            seen[expert] = 1
            page = first + expert
            if last_use[page] == _NEVER:
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
        if key > keys[0]:  # most pages of a large model are older: skip the search
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
    """Miss ratio of LRU as a function of slots, over the recent past.

    Args:
        pages: Number of pages of the model.
        experts: Number of experts per layer.
        every: Average number of events between samples; 1 = all. By default chosen so that
            sampling costs less than a microsecond per event.
        window: Samples after which the weight of older ones has decayed to 1/e; 0 = never.
        seed: Seed of the random intervals between samples, which prevent a bias to some layers.
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
        """Sample or only count an event that has not begun yet."""
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
        """Miss ratio for 0, 1 … ``pages`` slots, without first uses; non-increasing.

        All zeros before the first sample.
        """
        total = self._histogram.sum()
        misses = np.zeros(self._pages + 1)
        misses[:-1] = np.cumsum(self._histogram[:-1][::-1])[::-1]
        return misses / total if total else misses

    @property
    def first_uses(self) -> float:
        """Share of accesses that were the first of their page."""
        total = self._histogram.sum()
        return float(self._histogram[-1] / total) if total else 0.0


@jit_allocating
def convex_hull(curve: Floats) -> Floats:
    """Compute the lower convex hull of a miss-ratio curve.

    Where LRU's curve has a cliff (scanning all pages in every step always misses unless all fit), a
    better policy can avoid misses: by keeping a fixed part of the pages it reaches every point of
    the hull (Talus, Beckmann and Sanchez, 2015).
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


#: Reuse is sampled once in this many events; prime, to avoid a bias to some layers.
REUSE_EVERY = 61


class PageAges:
    """Ages of pages since the last reset.

    Args:
        books: The books of the pages.

    Attributes:
        counts: int64 ``[3, AGES]``, number of pages by kind and bucket.
        sums: int64 ``[3]``, sum of their ages by kind, in events.
    """

    def __init__(self, books: Books) -> None:
        self._books, self._directory = books, directory(books)
        self.counts = np.zeros((3, AGES), np.int64)
        self.sums = np.zeros(3, np.int64)
        self.leave(np.zeros(0, np.int64))  # compiled, or read from disk, before the first event

    def reset(self) -> None:
        """Clear all counts."""
        self.counts[:] = self.sums[:] = 0

    def routed(self, layer: int, ids: Ints) -> None:
        """Count reuse in an event that has not begun yet."""
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
