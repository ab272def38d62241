"""The paged MoE layer, which maps experts to slots between routing and the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from fluxmoe.backends import op
from fluxmoe.backends.sealed import FixedParameters, Sealed, seal
from fluxmoe.backends.vllm.compat.worker import RoutedExperts
from fluxmoe.core.types import Geometry, PageClass, Part
from fluxmoe.errors import UnsupportedError

#: Parameters of a layer that hold its experts; each is a part of the experts' pages.
PARTS = ("w13_weight", "w2_weight")

#: The way to change a model's weights.
RELOAD = "call reload_weights, or load_weights of the whole model, with names as in the checkpoint"


class PagedWeight(Sealed):
    """Weights of a layer's experts, as code outside the layer finds them: without memory."""

    fix = RELOAD


class AsComputed:
    """A layer as its kernel sees it: the weights are arenas, everything else is the layer's."""

    def __init__(self, layer: PagedRoutedExperts, parts: dict[str, torch.Tensor]) -> None:
        self._layer = layer
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class PagedRoutedExperts(RoutedExperts):
    """vLLM's routed experts; after ``bind``, they compute with the slots of an arena."""

    _pager: int | None = None
    _layer: int = -1
    _computed: AsComputed
    _parameters: dict[str, torch.nn.Parameter | None]
    #: True to pass routing weights to a recorder. A compiled model ignores later changes.
    notes_weights = False

    def bind(self, pager: int, layer: int, parts: dict[str, torch.Tensor]) -> None:
        """Compute on arenas from now on; the parameters give up their memory and are sealed.

        Args:
            pager: Handle of the pager (``op.attach``).
            layer: Index of the MoE layer, from 0.
            parts: Parameter name → arena ``[slots, …]`` of the layer's bank.
        """
        self._pager, self._layer = pager, layer
        self._computed = AsComputed(self, parts)
        for name in parts:
            weight = getattr(self, name)
            weight.data = weight.new_empty(1).expand(weight.shape)
            seal(weight, PagedWeight)
        self._parameters = FixedParameters(self._parameters, RELOAD)

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> torch.Tensor:
        """Run the stock kernel with slots in place of expert ids."""
        if self._pager is None:
            return super().forward_modular(x, topk_weights, topk_ids, *args, **kw)
        if self.notes_weights:
            topk_ids = op.note(topk_ids, topk_weights, None, self._pager)
        topk_ids = op.acquire(topk_ids, self._pager, self._layer)
        return RoutedExperts.forward_modular(self._computed, x, topk_weights, topk_ids, *args, **kw)


@cache
def use_paged_layers() -> None:
    """Make vLLM build paged layers in place of its routed experts in this process."""
    RoutedExperts.register_oot(PagedRoutedExperts, name="RoutedExperts")


def sizes_of(layers: Sequence[RoutedExperts]) -> tuple[Geometry, PageClass]:
    """Return the sizes of layers' experts. Raises UnsupportedError if the layouts differ."""
    shapes = {
        tuple((name, getattr(m, name).shape, getattr(m, name).dtype) for name in PARTS)
        for m in layers
    }
    if len(shapes) > 1:
        raise UnsupportedError(f"the layers have experts with {len(shapes)} different layouts")
    weights = {name: getattr(layers[0], name) for name in PARTS}
    parts = (Part(n, w[0].numel() * w.element_size(), w[0].numel()) for n, w in weights.items())
    return Geometry(len(layers), weights[PARTS[0]].shape[0]), PageClass(tuple(parts))
