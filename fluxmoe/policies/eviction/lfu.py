"""``lfu``: least frequently used, over the whole run. A classic policy."""

from __future__ import annotations

from fluxmoe.core.policy.paging import EvictionPolicy


class LeastFrequentlyUsed(EvictionPolicy):
    """Evict the page used in the fewest events (classic LFU); counts are kept after eviction."""

    stable_score = True

    @staticmethod
    def score_kernel(last_use: int, use_count: int, loaded_at: int, event: int, page: int) -> float:
        return float(use_count)
