"""``lru``: least recently used. A classic policy.

The worst case is a layer that uses all its experts, so that each step is a scan.
"""

from __future__ import annotations

from fluxmoe.core.policy.paging import EvictionPolicy


class LeastRecentlyUsed(EvictionPolicy):
    """Evict the least recently used page (classic LRU)."""

    stable_score = True

    @staticmethod
    def score_kernel(last_use: int, use_count: int, loaded_at: int, event: int, page: int) -> float:
        return float(last_use)
