"""Least frequently used, over the whole run."""

from __future__ import annotations

from fluxmoe.core.policy import EvictionPolicy, PageView
from fluxmoe.core.types import Int64s


class LeastFrequentlyUsed(EvictionPolicy):
    """Evict the page that was used in the fewest events; counts survive eviction."""

    stable_score = True

    def score(self, view: PageView, pages: Int64s) -> Int64s:
        return view.use_count[pages]
