"""``immediate``: release pages as soon as their layer has run.

Source: the FluxMoE paper, arXiv 2604.02715.
"""

from __future__ import annotations

import numpy as np

from fluxmoe.core.policy.paging import EvictionPolicy, PageView
from fluxmoe.core.types import Access, Bools, Int64s


class Immediate(EvictionPolicy):
    """Free every page once its layer has run (arXiv 2604.02715)."""

    stable_score = True

    def score(self, view: PageView, pages: Int64s) -> Int64s:
        return view.last_use[pages]  # any order will do: only prefetched pages can be candidates

    def retain(self, view: PageView, access: Access) -> Bools:
        return np.zeros(len(access.pages), np.bool_)
