"""Least frequently used, over the whole run."""

from __future__ import annotations

from fluxmoe.core.policy.paging import EvictionPolicy


class LeastFrequentlyUsed(EvictionPolicy):
    """Evict the page that was used in the fewest events; counts survive eviction."""

    stable_score = True

    @staticmethod
    def score_kernel(last_use: int, use_count: int, loaded_at: int, event: int, page: int) -> float:
        return float(use_count)
