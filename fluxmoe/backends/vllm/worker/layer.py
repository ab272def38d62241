"""The paged MoE layer, which maps experts to slots between routing and the kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fluxmoe.backends import op
from fluxmoe.backends.vllm.compat.worker import RoutedExperts

#: Parameters of a layer that hold its experts; each is a part of the experts' pages.
PARTS = ("w13_weight", "w2_weight")


class PagedRoutedExperts(RoutedExperts):
    """vLLM's routed experts; after ``bind``, their weights are the slots of an arena."""

    _pager: int | None = None
    _layer: int = -1
    #: True to pass routing weights to a recorder. A compiled model ignores changes to this value.
    notes_weights = False

    def bind(self, pager: int, layer: int, parts: dict[str, torch.Tensor]) -> None:
        """Compute on arenas from now on.

        Args:
            pager: Handle of the pager (``op.attach``).
            layer: Index of the MoE layer, from 0.
            parts: Parameter name → arena ``[slots, …]`` of the layer's bank.
        """
        self._pager, self._layer = pager, layer
        for name, arena in parts.items():
            # The Parameter is kept, because vLLM's kernel object and compiled graphs refer to it.
            getattr(self, name).data = arena

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> torch.Tensor:
        """Run the stock kernel with slots in place of expert ids."""
        if self._pager is not None:
            if self.notes_weights:
                topk_ids = op.note(topk_ids, topk_weights, None, self._pager)
            topk_ids = op.acquire(topk_ids, self._pager, self._layer)
        return super().forward_modular(x, topk_weights, topk_ids, *args, **kw)


@cache
def use_paged_layers() -> None:
    """Make vLLM build paged layers in place of its routed experts in this process."""
    RoutedExperts.register_oot(PagedRoutedExperts, name="RoutedExperts")
