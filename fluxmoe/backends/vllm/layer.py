"""The paged MoE layer: routing is known, the kernel not yet started — here experts become slots."""

from __future__ import annotations

from typing import Any

import torch

from fluxmoe.backends import op
from fluxmoe.backends.vllm import WORKER_CLS
from fluxmoe.backends.vllm.compat import RoutedExperts, get_current_vllm_config
from fluxmoe.errors import ConfigError


class PagedRoutedExperts(RoutedExperts):
    """vLLM's routed experts; once bound to a pager, its weights are the slots of an arena."""

    _pager: int | None = None
    _layer: int = -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config()
        additional = config.additional_config
        if isinstance(additional, dict) and "fluxmoe" in additional:
            worker = config.parallel_config.worker_cls
            if worker != WORKER_CLS:
                raise ConfigError(
                    f"the worker class is {worker!r}, which does not page",
                    where="additional_config.fluxmoe",
                    fix=f"add --worker-cls {WORKER_CLS}",
                )
        super().__init__(*args, **kwargs)

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
            topk_ids = op.acquire(topk_ids, self._pager, self._layer)
        return super().forward_modular(x, topk_weights, topk_ids, *args, **kw)


def register() -> None:
    """Have vLLM build PagedRoutedExperts wherever a model has routed experts."""
    RoutedExperts.register_oot(PagedRoutedExperts, name="RoutedExperts")
