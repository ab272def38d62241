"""Collection of the new weights of one layer's experts, which vLLM loads, for the store."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.vllm.compat.reload import unloaded
from fluxmoe.backends.vllm.worker.layer import PARTS, PagedRoutedExperts
from fluxmoe.backends.weights import SAME
from fluxmoe.core.types import Bytes
from fluxmoe.errors import WeightsError

#: vLLM's numbers of the three matrices of an expert, with their names.
_MATRICES = {"w1": "gate projection", "w3": "up projection", "w2": "down projection"}


class NewExperts:
    """The new experts of a layer, passed on when all have been given, or else by ``finish``.

    Args:
        layer: The layer, whose parameters are replaced by ``stand_ins`` during loading.
        put: Takes over an expert's number and its parts.
    """

    def __init__(self, layer: PagedRoutedExperts, put: Callable[[int, list[Bytes]], None]) -> None:
        self._layer, self._put = layer, put
        before = {name: unloaded(layer, name) for name in PARTS}
        moe = layer.moe_config
        inner, outer = moe.intermediate_size_per_partition_unpadded, moe.hidden_dim_unpadded
        inner *= moe.moe_parallel_config.tp_size
        self._shapes = {"w1": (inner, outer), "w3": (inner, outer), "w2": (outer, inner)}
        self._count = len(before[PARTS[0]])
        self._given: set[tuple[int, str]] = set()
        self._weights: dict[str, torch.nn.Parameter] = {}
        #: Parameter → a parameter without memory that collects the weights loaded into it.
        self.stand_ins = {name: self._stand_in(weight, name) for name, weight in before.items()}

    def finish(self) -> int:
        """Pass on the remaining experts, and return the number of all experts that were given.

        Raises:
            WeightsError: An expert was not given as a whole.
        """
        experts = {expert for expert, _ in self._given}
        for expert in sorted(experts):
            missing = [name for matrix, name in _MATRICES.items()
                       if (expert, matrix) not in self._given]  # fmt: skip
            if missing:
                raise WeightsError(
                    f"expert {expert} of {self._layer.layer_name} has no {', '.join(missing)}",
                    fix="give all three projections of an expert in one update",
                )
        if self._weights:
            self._hand_on()
        return len(experts)

    def _stand_in(self, before: torch.Tensor, name: str) -> torch.nn.Parameter:
        stand_in = torch.nn.Parameter(torch.empty_like(before), requires_grad=False)

        @wraps(self._layer.weight_loader)  # keeps the attributes set by vLLM
        def load(
            param: object,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> Any:
            self._require(loaded_weight, shard_id, expert_id)
            if not self._weights:  # zeros occupy no memory until they are written
                self._weights = {
                    part: torch.nn.Parameter(torch.zeros_like(each, device="cpu"), False)
                    for part, each in self.stand_ins.items()
                }
            weight, expected = self._weights[name], (expert_id, shard_id)
            loaded = self._layer.weight_loader(
                weight, loaded_weight, weight_name, shard_id, expert_id, return_success
            )
            self._given.add(expected)
            if len(self._given) == len(_MATRICES) * self._count:
                self._hand_on()
            return loaded

        stand_in.weight_loader = load
        return stand_in

    def _require(self, weight: torch.Tensor, matrix: str, expert: int) -> None:
        what = f"expert {expert}'s {_MATRICES[matrix]} in {self._layer.layer_name}"
        if (expert, matrix) in self._given:
            raise WeightsError(f"{what} was given twice", fix="give each weight once")
        if tuple(weight.shape) != self._shapes[matrix]:
            raise WeightsError(
                f"{what} has the shape {[*weight.shape]}, not {[*self._shapes[matrix]]}", fix=SAME
            )

    def _hand_on(self) -> None:
        """Pass the layer's experts on in the kernel's layout, and free their memory."""
        packed = torch.nn.Module()
        for name, weight in self._weights.items():
            packed.register_parameter(name, weight)
        self._weights = {}
        # vLLM calls this after the first loading, but not after loading a layer again.
        self._layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(packed)
        parts = [as_rows(getattr(packed, name)) for name in PARTS]
        for expert in sorted({expert for expert, _ in self._given}):
            self._put(expert, [rows[expert] for rows in parts])
