"""Prediction of the next layer's experts: its router on this layer's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from fluxmoe.backends import op
from fluxmoe.backends.vllm.worker.layer import PagedRoutedExperts
from fluxmoe.errors import UnsupportedError


def predict_next(model: torch.nn.Module, layers: Sequence[PagedRoutedExperts], handle: int) -> None:
    """Let each paged layer predict the experts of the layer that follows it.

    A prediction is the ``top_k`` largest router logits or, if the router has a correction bias, of
    their sigmoids plus the bias. Groups of experts are ignored.

    Args:
        model: The model.
        layers: Its paged layers, in order.
        handle: Handle of their pager.

    Raises:
        UnsupportedError: A layer's router was not found.
    """
    gates = {
        layer: module.gate
        for module in model.modules()
        if isinstance(getattr(module, "gate", None), torch.nn.Module)
        for layer in module.modules()
        if isinstance(layer, PagedRoutedExperts)
    }
    for index, layer in enumerate(layers):
        if index + 1 == len(layers):
            op.use_router(handle, index, _none)
        else:
            following = layers[index + 1]
            gate = gates.get(following)
            if not isinstance(getattr(gate, "weight", None), torch.Tensor):
                raise UnsupportedError(
                    f"layer {index + 1} of {type(model).__name__} has no router `gate`, so its "
                    "experts cannot be predicted",
                    fix="choose another prefetch policy",
                )
            op.use_router(handle, index, partial(_choose, gate, following.top_k))
        layer.predicts = True


def _choose(gate: torch.nn.Module, top_k: int, x: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(x.to(gate.weight.dtype), gate.weight).float()
    bias = getattr(gate, "e_score_correction_bias", None)
    scores = logits if bias is None else logits.sigmoid() + bias.float()
    return scores.topk(top_k, -1).indices


def _none(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(x), 0, dtype=torch.int64)
