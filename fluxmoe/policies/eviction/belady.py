"""Belady's MIN: the optimum for equal page sizes when every miss must be admitted."""

from __future__ import annotations

from fluxmoe.core.policy.paging import EvictionPolicy


class Belady(EvictionPolicy):
    """Oracle: evict the page whose next use lies furthest ahead (Belady, 1966). Simulator only."""

    stable_score = True
    needs_future = True

    @staticmethod
    def score_kernel(
        last_use: int, use_count: int, loaded_at: int, event: int, page: int, next_use: int
    ) -> float:
        return -float(next_use)
