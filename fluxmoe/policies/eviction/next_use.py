"""Expected time to next use: what Belady knows, estimated from routing frequency and layer order.

The layers take their turns in a fixed cycle, so a page's *earliest* next use is known exactly: its
layer's next turn, ``distance`` events ahead. Whether it is routed to then is not; with probability
``p`` per turn, the expected wait is ``distance + (1/p − 1) · layers`` events. Where a layer uses
all its experts (large batches), p is 1 for every page and the rule becomes Belady's for cyclic
scans, where LRU hits nothing. Where routing is sparse, p dominates.

One over p is the turns per use so far, and 0.3 turns for each turn that has gone by since the last
use, since favourites change. A request often keeps an expert for its next token; therefore one
tenth of what is missing to certainty is added to p just after a use, a quarter of that one turn
later, a ninth after two, and so on.
"""

from __future__ import annotations

import numpy as np

from fluxmoe.core.policy.paging import EvictionPolicy

# Found on synthetic traces of seed 1; docs/policies.md has what else was tried.
_RECENCY, _AGAIN = 0.3, 0.1


class NextUse(EvictionPolicy):
    """Evict the page with the longest expected time to its next use."""

    @staticmethod
    def score_kernel(
        last_use: int, use_count: int, loaded_at: int, event: int, page: int,
        distance: int, layer: int, num_layers: int,
    ) -> float:  # fmt: skip
        # Whole divisions in floating point: exact far beyond any event number, and the processor
        # does several at a time.
        rounds = np.floor(event / num_layers)
        # Turns of its layer, and one more. What is the same for all pages is added first.
        turns = rounds + 1.0 + (1.0 if layer <= event - rounds * num_layers else 0.0)
        # The whole quotient, too: half an event is more than what rounding loses.
        missed = np.floor((event + 0.5 - last_use) * (1.0 / num_layers))
        # One use in two turns is assumed of a page that was never seen, and washes out.
        uses = use_count + 0.5
        # In turns and times ``uses``: one over p, without what follows.
        wait = max(uses, turns) + _RECENCY * missed * uses
        late = (missed + 1.0) * (missed + 1.0)
        # 1 / (p + _AGAIN * (1 - p) / late), with one division in place of four
        wait = wait * late / (late * uses + _AGAIN * (wait - uses))
        return -float(distance + (wait - 1.0) * num_layers)
