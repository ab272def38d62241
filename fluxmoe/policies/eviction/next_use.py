"""Expected time to next use: what Belady knows, estimated from routing frequency and layer order.

The layers take their turns in a fixed cycle, so a page's *earliest* next use is known exactly: its
layer's next turn, ``distance`` events ahead. Whether it is routed to then is not; with probability
``p`` per turn, the expected wait is ``distance + (1/p − 1) · layers`` events. Where a layer uses
all its experts (large batches), p is 1 for every page and the rule becomes Belady's for cyclic
scans, where LRU hits nothing. Where routing is sparse, p dominates.
"""

from __future__ import annotations

from fluxmoe.core.policy import EvictionPolicy


class NextUse(EvictionPolicy):
    """Evict the page with the longest expected time to its next use."""

    @staticmethod
    def score_kernel(
        last_use: int, use_count: int, loaded_at: int, event: int, page: int,
        distance: int, num_layers: int,
    ) -> float:  # fmt: skip
        turns = event / num_layers + 1
        # One over the probability; one use in two turns is assumed of a page that was never seen,
        # and washes out.
        tries = max(1.0, (turns + 1.0) / (use_count + 0.5))
        return -(distance + (tries - 1.0) * num_layers)
