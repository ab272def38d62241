"""Expected time to next use: what Belady knows, estimated from routing frequency and layer order.

The layers take their turns in a fixed cycle, so a page's *earliest* next use is known exactly: its
layer's next turn, ``distance`` events ahead. Whether it is routed to then is not; with probability
``p`` per turn, the expected wait is ``distance + (1/p − 1) · layers`` events. Where a layer uses
all its experts (large batches), p is 1 for every page and the rule becomes Belady's for cyclic
scans, where LRU hits nothing. Where routing is sparse, p dominates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fluxmoe.core.policy import EvictionPolicy, PageView
from fluxmoe.core.types import Int64s


class NextUse(EvictionPolicy):
    """Evict the page with the longest expected time to its next use."""

    def score(self, view: PageView, pages: Int64s) -> npt.NDArray[np.float64]:
        layers = view.num_layers
        distance = (pages // view.experts_per_layer - view.layer - 1) % layers + 1
        turns = view.event / layers + 1
        # One use in two turns is assumed of a page that was never seen, and washes out.
        probability = np.minimum(1.0, (view.use_count[pages] + 0.5) / (turns + 1.0))
        wait: npt.NDArray[np.float64] = distance + (1.0 / probability - 1.0) * layers
        return -wait
