"""``lfru``: frequency and recency combined, for routing whose favourite experts change.

FluxMoE's own variant of ``next-use``. A page's expected wait is estimated from its frequency.
Frequencies cover the whole run, so a page that was popular long ago would be kept for long.
Therefore each turn of its layer that has passed since its last use adds ``recency`` turns to the
wait. Turns are counted, not events: by events the layer that has just run would look freshest,
although it is the last to come round again, which is where lru, and lfu with a bonus for age, fail
on scans.
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
    """Evict the page with the longest expected wait, by its frequency and time since last use."""

    def __init__(self, recency: float = 0.3) -> None:
        self._recency = recency

    def make_kernel(self, view: PageView) -> ScoreKernel:
        recency = self._recency

        def kernel(
            last_use: int, use_count: int, loaded_at: int, event: int, page: int,
            distance: int, layer: int, num_layers: int,
        ) -> float:  # fmt: skip
            # Integer divisions in floating point: exact far beyond any event number, and
            # vectorisable.
            rounds = np.floor(event / num_layers)
            turns = rounds + (1.0 if layer <= event - rounds * num_layers else 0.0)  # of its layer
            # Also an exact quotient: half an event exceeds the rounding error.
            missed = np.floor((event - last_use + 0.5) * (1.0 / num_layers))
            # One over the probability. The prior, one use in two turns, fades with more turns.
            tries = max(1.0, (turns + 1.0) / (use_count + 0.5))
            return -float(distance + (tries - 1.0 + recency * missed) * num_layers)

        return kernel
