"""The paged MoE layer: routing is known, the kernel not yet started — here experts become slots.

Importing this module has vLLM build it wherever a model has routed experts.
"""

from __future__ import annotations

from typing import Any

import torch

from fluxmoe.backends import op
from fluxmoe.backends.vllm.compat.worker import RoutedExperts


class PagedRoutedExperts(RoutedExperts):
    """vLLM's routed experts; once bound to a pager, its weights are the slots of an arena."""

    _pager: int | None = None
    _layer: int = -1
    #: Show a recorder the routing weights. A compiled model does not look at it any more.
    notes_weights = False

    def bind(self, pager: int, layer: int, parts: dict[str, torch.Tensor]) -> None:
        """From now on compute on arenas.

        Args:
            pager: Handle of the pager (``op.attach``).
            layer: MoE layer, from 0.
            parts: Parameter name → arena ``[slots, …]`` of the layer's bank.
        """
        self._pager, self._layer = pager, layer
        for name, arena in parts.items():
            # The Parameter stays: vLLM's kernel object and compiled graphs refer to it.
            getattr(self, name).data = arena

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> torch.Tensor:
        """The stock kernel, with slots in place of expert ids."""
        if self._pager is not None:
            if self.notes_weights:
                topk_ids = op.note(topk_ids, topk_weights, None, self._pager)
            topk_ids = op.acquire(topk_ids, self._pager, self._layer)
        return super().forward_modular(x, topk_weights, topk_ids, *args, **kw)


# This module is imported once, and only by a process that pages.
RoutedExperts.register_oot(PagedRoutedExperts, name="RoutedExperts")
