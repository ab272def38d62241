"""``next-use``: expected time to next use, estimated from routing frequency and layer order.

FluxMoE's own policy, an estimate of Belady's MIN. Layers run in a fixed cycle, so a page's
*earliest* next use is known exactly: its layer's next turn, ``distance`` events ahead. If the page
is routed to with probability ``p`` per turn, the expected wait is ``distance + (1/p − 1) · layers``
events. If a layer uses all its experts (large batches), p is 1 for every page and the rule becomes
Belady's for cyclic scans, where LRU always misses. If routing is sparse, p dominates.

1/p is estimated as the turns per use so far, plus 0.3 turns for each turn since the last use,
because popular experts change. A request often keeps an expert for its next token; therefore one
tenth of (1 − p) is added to p just after a use, a quarter of that amount one turn later, a ninth
two turns later, and so on.
"""

from __future__ import annotations

import numpy as np

from fluxmoe.core.policy.paging import EvictionPolicy

# Tuned on synthetic traces with seed 1; docs/concepts/built-in-policies.md lists the alternatives.
_RECENCY, _AGAIN = 0.3, 0.1


class NextUse(EvictionPolicy):
    """Evict the page with the longest expected time to its next use."""

    @staticmethod
    def score_kernel(
        last_use: int, use_count: int, loaded_at: int, event: int, page: int,
        distance: int, layer: int, num_layers: int,
    ) -> float:  # fmt: skip
        # Integer division in floating point: exact for any event number, and vectorisable.
        rounds = np.floor(event / num_layers)
        # Turns of the page's layer, plus one. Terms common to all pages are added first.
        turns = rounds + 1.0 + (1.0 if layer <= event - rounds * num_layers else 0.0)
        # Also exact: half an event exceeds the rounding error.
        missed = np.floor((event + 0.5 - last_use) * (1.0 / num_layers))
        # The prior, half a use in one turn, fades with more turns.
        uses = use_count + 0.5
        # 1/p in turns, times ``uses``, without the bonus below.
        wait = max(uses, turns) + _RECENCY * missed * uses
        late = (missed + 1.0) * (missed + 1.0)
        # 1 / (p + _AGAIN * (1 - p) / late), with one division instead of four
        wait = wait * late / (late * uses + _AGAIN * (wait - uses))
        return -float(distance + (wait - 1.0) * num_layers)
