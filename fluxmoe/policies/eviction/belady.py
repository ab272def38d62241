"""``belady``: Belady's MIN, optimal for equal page sizes if every miss must be admitted.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM
Systems Journal, 1966.
"""

from __future__ import annotations

from fluxmoe.core.policy.paging import EvictionPolicy


class Belady(EvictionPolicy):
    """Oracle: evict the page with the farthest next use (Belady, 1966). Simulator only."""

    stable_score = True
    needs_future = True

    @staticmethod
    def score_kernel(
        last_use: int, use_count: int, loaded_at: int, event: int, page: int, next_use: int
    ) -> float:
        return -float(next_use)
