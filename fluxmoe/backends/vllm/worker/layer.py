"""The paged MoE layer, which maps experts to slots between routing and the kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from fluxmoe.backends import op
from fluxmoe.backends.sealed import AsComputed, FixedParameters, Sealed, seal
from fluxmoe.backends.vllm.compat.worker import RoutedExperts
from fluxmoe.backends.vllm.worker.weights.streamed import PARTS, streamed

#: Remedy for unsupported changes to a model's weights.
RELOAD = "call reload_weights, or load_weights of the whole model, with names as in the checkpoint"


class PagedWeight(Sealed):
    """A placeholder without memory for the weights of a layer's experts."""

    fix = RELOAD


class PagedRoutedExperts(RoutedExperts):
    """vLLM's routed experts; after ``bind``, they compute with the slots of an arena."""

    _pager: int | None = None
    _layer: int = -1
    _computed: AsComputed
    _parameters: dict[str, torch.nn.Parameter | None]
    #: Receives the weights that vLLM loads (``NewExperts.take``); if None, the parameters do.
    incoming: Callable[[torch.Tensor, str, str, int], None] | None = None
    _waves = False
    #: True to pass routing weights to a recorder. A compiled model ignores later changes.
    notes_weights = False
    #: True to predict the next layer's experts with the router given to ``op.use_router``.
    predicts = False

    def _get_quant_method(self, *args: Any, **kw: Any) -> Any:
        method = super()._get_quant_method(*args, **kw)
        return streamed(method, self.moe_config)

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Load a matrix of an expert like stock vLLM, or pass the matrix to ``incoming``."""
        if self.incoming is None:
            loaded: bool | None = super().weight_loader(
                param, loaded_weight, weight_name, shard_id, expert_id, return_success
            )
            return loaded
        self.incoming(loaded_weight, weight_name, shard_id, expert_id)
        return True if return_success else None

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    def bind(
        self, pager: int, layer: int, parts: dict[str, torch.Tensor], *, waves: bool = False
    ) -> None:
        """Compute on arenas from now on; the parameters release their memory and are sealed.

        Args:
            pager: Handle of the pager (``op.attach``).
            layer: Index of the MoE layer, from 0.
            parts: Parameter name → arena ``[slots, …]`` of the layer's bank.
            waves: True if the bank may have fewer slots than the layer has experts. An operator
                then replaces the kernel, at the kernel's place in a compiled model.
        """
        self._pager, self._layer, self._waves = pager, layer, waves
        if waves:
            fused = self.quant_method.moe_kernel.fused_experts
            op.use_kernel(pager, layer, partial(_on_slots, fused, self, parts))
            fused.apply = partial(_in_waves, pager, layer)
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
        """Run the stock kernel with slots in place of expert ids, or the operator for waves."""
        if self._pager is None:
            return super().forward_modular(x, topk_weights, topk_ids, *args, **kw)
        if self.predicts:
            topk_ids = op.predict(topk_ids, x, self._pager, self._layer)
        if self.notes_weights:
            topk_ids = op.note(topk_ids, topk_weights, None, self._pager)
        if not self._waves:
            topk_ids = op.acquire(topk_ids, self._pager, self._layer)
        return RoutedExperts.forward_modular(self._computed, x, topk_weights, topk_ids, *args, **kw)


def _on_slots(
    fused: Any,
    layer: RoutedExperts,
    parts: dict[str, torch.Tensor],
    out: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Run the stock kernel of a layer on arenas."""
    w13, w2 = (parts[name] for name in PARTS)
    type(fused).apply(
        fused,
        output=out,
        hidden_states=x,
        w1=w13,
        w2=w2,
        topk_weights=weights,
        topk_ids=slots,
        activation=layer.activation,
        global_num_experts=len(w13),
        expert_map=None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=None,
        workspace2=None,
        expert_tokens_meta=None,
        apply_router_weight_on_input=layer.apply_router_weight_on_input,
    )


def _in_waves(
    pager: int,
    layer: int,
    *,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    **others: Any,
) -> None:
    """Run a layer in waves; replaces a kernel's ``apply`` and has the same keyword arguments."""
    op.compute(output, hidden_states, topk_weights, topk_ids, pager, layer)


@cache
def use_paged_layers() -> None:
    """Make vLLM build paged layers in place of its routed experts in this process."""
    RoutedExperts.register_oot(PagedRoutedExperts, name="RoutedExperts")
