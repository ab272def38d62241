"""SIEVE for expert pages.

Zhang, Yang, Yue, Vigfusson, Rashmi: "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction
Algorithm for Web Caches", NSDI 2024. Pages are in a queue in insertion order. A hand moves from the
oldest towards the newest: it skips pages that were used since its last visit, clearing their mark,
and evicts the first page that was not. Unlike in CLOCK, surviving pages keep their position, so new
pages are examined soon and popular old ones rarely.

Differences from the paper:

* FluxMoE evicts for a whole event at once. The hand selects the requested number of victims in
  turn; pages of the current event are not candidates and are skipped, keeping their mark.
* A page counts as used once per event that routes to it, regardless of the number of tokens.
* Layers run in a fixed order, so pages are scanned cyclically. If a layer uses all its experts,
  every page is marked when the hand arrives: SIEVE becomes FIFO, which evicts the pages needed
  next. SIEVE is suited to skewed use, that is, to small batches.
"""

import numpy as np

import fluxmoe

__version__ = "0.1.0"
fluxmoe_plugin_api = 1


class Sieve(fluxmoe.EvictionPolicy):
    """Evict the oldest page not used since the hand's last visit (SIEVE, NSDI 2024)."""

    def __init__(self):
        self.reset()

    def reset(self):
        self._queue = {}  # page -> None: a dictionary keeps the order of insertion, oldest first
        self._marked = set()
        self._hand = None  # the page to examine next; None = the oldest

    def on_access(self, view, access):
        self._marked.update(access.pages[access.hit].tolist())

    def on_load(self, view, pages):
        for page in pages.tolist():
            self._drop(page)  # the page may have left without being a victim
            self._queue[page] = None

    def on_evict(self, view, pages):
        for page in pages.tolist():
            self._drop(page)

    def select(self, view, pages, n):
        candidates, victims = set(pages.tolist()), []
        order = list(self._queue)
        if not order:
            return pages[:n]
        at = order.index(self._hand) if self._hand in self._queue else 0
        # Two rounds: the first may only clear marks, and the second then finds none.
        for _ in range(2 * len(order)):
            page = order[at]
            at = (at + 1) % len(order)
            if page not in candidates:
                continue
            if page in self._marked:
                self._marked.discard(page)
                continue
            candidates.discard(page)
            victims.append(page)
            if len(victims) == n:
                break
        self._hand = order[at]
        # Pages that are not in the queue come last: they were loaded before the policy was created.
        victims += sorted(candidates)[: n - len(victims)]
        return np.asarray(victims, np.int64)

    def _drop(self, page):
        self._queue.pop(page, None)
        self._marked.discard(page)


@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("sieve", Sieve)
