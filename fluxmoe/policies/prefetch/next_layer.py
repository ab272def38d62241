"""``next-layer``: fetches whole layers ahead, as in the FluxMoE paper (arXiv 2604.02715).

This is effective if a layer uses most of its experts, and wasteful otherwise.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fluxmoe.core.policy.paging import PageView, PrefetchPolicy
from fluxmoe.core.types import Access, Int64s


class NextLayerOptions(BaseModel):
    """Options of ``next-layer``."""

    model_config = ConfigDict(extra="forbid")
    depth: int = Field(default=1, ge=1, description="Number of layers to fetch ahead.")


class NextLayer(PrefetchPolicy):
    """Fetch all experts of the next layers, cyclically (arXiv 2604.02715)."""

    def __init__(self, depth: int = 1) -> None:
        self.lead = depth

    def propose(self, view: PageView, access: Access) -> Int64s:
        experts = np.arange(view.experts_per_layer)
        ahead = min(self.lead, view.num_layers - 1)
        layers = [(access.layer + 1 + i) % view.num_layers for i in range(ahead)]
        pages = [view.page_of(layer, experts) for layer in layers]
        return np.concatenate(pages) if pages else access.pages[:0]
