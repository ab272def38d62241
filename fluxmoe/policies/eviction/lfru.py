"""Least frequently and least recently used: next-use for routing whose favourites change.

A page's expected wait is estimated from its frequency, as in ``next-use``. Frequencies cover the
whole run, so a page that was popular long ago would be kept for long. Therefore each turn of its
layer that has gone by since its last use adds ``recency`` turns to the wait. Turns, not events,
are counted: by events the layer that has just run would look freshest, although it is the last to
come round again, which is where lru, and lfu with a bonus for age, go wrong on scans.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fluxmoe.core.policy import EvictionPolicy, PageView
from fluxmoe.core.types import Int64s


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

    def score(self, view: PageView, pages: Int64s) -> npt.NDArray[np.float64]:
        layers = view.num_layers
        layer = pages // view.experts_per_layer
        turns = (view.event - layer) // layers + 1  # those that the page's layer has had
        missed = (view.event - view.last_use[pages]) // layers
        # One use in two turns is assumed of a page that was never seen, and washes out.
        probability = np.minimum(1.0, (view.use_count[pages] + 0.5) / (turns + 1.0))
        distance = (layer - view.layer - 1) % layers + 1
        waits = 1.0 / probability - 1.0 + self._recency * missed
        wait: npt.NDArray[np.float64] = distance + waits * layers
        return -wait
