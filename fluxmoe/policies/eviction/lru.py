"""Least recently used. Worst case: every layer uses all its experts, so each step is one scan."""

from __future__ import annotations

from fluxmoe.core.policy import EvictionPolicy, PageView
from fluxmoe.core.types import Int64s


class LeastRecentlyUsed(EvictionPolicy):
    """Evict the page that was used longest ago."""

    stable_score = True

    def score(self, view: PageView, pages: Int64s) -> Int64s:
        return view.last_use[pages]
