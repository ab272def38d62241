"""``lfru``: frequency and recency combined, for routing whose popular experts change.

This is FluxMoE's own variant of ``next-use``. A page's expected wait is estimated from the page's
frequency. Frequencies cover the whole run, so a page that was popular long ago would be kept for
too long. Therefore each turn of the page's layer since the page's last use adds ``recency`` turns
to the wait. Turns are counted rather than events: counting events would favour the layer that has
just run, although that layer is the last to run again. For this reason, lru, and lfu with aging,
fail on scans.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fluxmoe.core.policy.paging import EvictionPolicy, PageView, ScoreKernel


class LfruOptions(BaseModel):
    """Options of ``lfru``."""

    model_config = ConfigDict(extra="forbid")
    recency: float = Field(
        default=0.3,
        ge=0,
        le=1000,
        description="Turns added to the expected wait per turn since the last use; 0 = none.",
    )


class LeastFrequentlyRecentlyUsed(EvictionPolicy):
    """Evict the page with the longest expected wait, by frequency and time since last use."""

    def __init__(self, recency: float = 0.3) -> None:
        self._recency = recency

    def make_kernel(self, view: PageView) -> ScoreKernel:
        recency = self._recency

        def kernel(
            last_use: int, use_count: int, loaded_at: int, event: int, page: int,
            distance: int, layer: int, num_layers: int,
        ) -> float:  # fmt: skip
            # Integer division in floating point: exact for any event number, and vectorisable.
            rounds = np.floor(event / num_layers)
            # Turns of the page's layer.
            turns = rounds + (1.0 if layer <= event - rounds * num_layers else 0.0)
            # Also exact: half an event exceeds the rounding error.
            missed = np.floor((event - last_use + 0.5) * (1.0 / num_layers))
            # Reciprocal of the probability. The prior, half a use in one turn, fades with time.
            tries = max(1.0, (turns + 1.0) / (use_count + 0.5))
            return -float(distance + (tries - 1.0 + recency * missed) * num_layers)

        return kernel
