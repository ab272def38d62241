"""Belady's MIN: the optimum for equal page sizes when every miss must be admitted."""

from __future__ import annotations

from fluxmoe.core.policy import EvictionPolicy, PageView
from fluxmoe.core.types import Int64s


class Belady(EvictionPolicy):
    """Oracle: evict the page whose next use lies furthest ahead (Belady, 1966). Simulator only."""

    stable_score = True
    needs_future = True

    def score(self, view: PageView, pages: Int64s) -> Int64s:
        return -view.next_use[pages]
