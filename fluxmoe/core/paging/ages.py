"""How old pages are when they leave, and how long they wait to be used again: for a person to see.

Counted where an engine evicts, beside the event rule, which a simulator runs millions of times.
"""

from __future__ import annotations

import numpy as np

from fluxmoe.core.paging.books import EVENT, NEVER, Books
from fluxmoe.core.types import AGES, IDLE, LIFETIME, REUSE, Int64s, Ints

#: Reuse is noted in one event of so many; a prime, so that no layer is preferred.
REUSE_EVERY = 61


class PageAges:
    """Ages of pages since the last reset.

    Attributes:
        counts: int64 ``[3, AGES]``: pages by kind and bucket.
        sums: int64 ``[3]``: the sum of their ages.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((3, AGES), np.int64)
        self.sums = np.zeros(3, np.int64)

    def reset(self) -> None:
        """Forget everything."""
        self.counts[:] = self.sums[:] = 0

    def routed(self, b: Books, layer: int, ids: Ints) -> None:
        """The next event is about to begin."""
        event = int(b.now[EVENT]) + 1
        if event % REUSE_EVERY == 0:
            last = b.last_use[np.unique(ids[ids >= 0]) + layer * b.tokens.size]
            self._note(REUSE, event - last[last != NEVER])

    def leave(self, b: Books, pages: Int64s) -> None:
        """``pages`` are about to leave."""
        loaded = b.loaded_at[pages]
        self._note(LIFETIME, b.now[EVENT] - loaded)
        # A page that was prefetched and never used was idle all the time.
        self._note(IDLE, b.now[EVENT] - np.maximum(b.last_use[pages], loaded))

    def _note(self, kind: int, ages: Int64s) -> None:
        buckets = np.frexp(np.maximum(ages - 1, 0))[1]
        self.counts[kind] += np.bincount(np.minimum(buckets, AGES - 1), minlength=AGES)
        self.sums[kind] += ages.sum()
