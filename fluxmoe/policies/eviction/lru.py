"""``lru``: least recently used. A classic policy.

Worst case: every layer uses all its experts, so each step is one scan.
"""

from __future__ import annotations

from fluxmoe.core.policy.paging import EvictionPolicy


class LeastRecentlyUsed(EvictionPolicy):
    """Evict the page that was used longest ago (classic LRU)."""

    stable_score = True

    @staticmethod
    def score_kernel(last_use: int, use_count: int, loaded_at: int, event: int, page: int) -> float:
        return float(last_use)
