"""Collection of the weights that vLLM loads for the experts of one layer, expert by expert."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.vllm.compat.reload import unloaded
from fluxmoe.backends.vllm.compat.worker import RoutedExperts
from fluxmoe.backends.vllm.worker.layer import PagedRoutedExperts
from fluxmoe.backends.vllm.worker.weights.streamed import PARTS
from fluxmoe.backends.weights import SAME
from fluxmoe.core.types import Bytes
from fluxmoe.errors import InvariantError, WeightsError

#: vLLM's name of each matrix of an expert → its name in messages.
_MATRICES = {"w1": "gate projection", "w3": "up projection", "w2": "down projection"}


class ExpertStage:
    """Memory for one expert as vLLM loads it, shared by layers with equal layouts.

    Args:
        layer: One of these layers.

    Attributes:
        one: Name of a parameter → its memory, ``[1, …]``; zero where a kernel needs padding.
        weights: ``one`` expanded to all experts, so that vLLM's code can index it by any expert.
    """

    def __init__(self, layer: PagedRoutedExperts) -> None:
        before = {name: unloaded(layer, name) for name in PARTS}
        self.one = {
            name: torch.zeros((1, *each.shape[1:]), dtype=each.dtype, device="cpu")
            for name, each in before.items()
        }
        self.weights = {
            name: torch.nn.Parameter(each.expand(before[name].shape), requires_grad=False)
            for name, each in self.one.items()
        }


class NewExperts:
    """The experts of a layer; each expert is passed on in the kernel's layout once it is complete.

    Only one expert at a time needs memory. Matrices of incomplete experts are not copied: they may
    be views of a mapped file.

    Args:
        layer: The layer, whose kernel has been set up.
        stage: Memory in which an expert is assembled.
        put: Function of an expert's number and parts; must copy the parts, because they are
            overwritten afterwards.
        known: Numbers of the experts that need not be passed on.
    """

    def __init__(
        self,
        layer: PagedRoutedExperts,
        stage: ExpertStage,
        put: Callable[[int, list[Bytes]], None],
        known: Collection[int] = (),
    ) -> None:
        self._layer, self._stage, self._put, self._known = layer, stage, put, known
        before = {name: unloaded(layer, name) for name in PARTS}
        moe = layer.moe_config
        inner, outer = moe.intermediate_size_per_partition_unpadded, moe.hidden_dim_unpadded
        inner *= moe.moe_parallel_config.tp_size
        self._shapes = {"w1": (inner, outer), "w3": (inner, outer), "w2": (outer, inner)}
        self._given: dict[int, dict[str, tuple[str, torch.Tensor]]] = {}
        self._whole: set[int] = set()
        #: Name of a parameter → a parameter without memory, which replaces it during loading.
        self.stand_ins = {name: self._stand_in(each) for name, each in before.items()}

    def take(self, weight: torch.Tensor, name: str, matrix: str, expert: int) -> None:
        """Take a matrix of one expert, or a 3-D tensor that contains this matrix of all experts.

        Args:
            weight: The tensor as in the checkpoint; on the meta device if the expert is known.
            name: vLLM's name of the weight.
            matrix: ``w1``, ``w2`` or ``w3``.
            expert: The expert's number; ignored for a 3-D tensor.

        Raises:
            WeightsError: The matrix was given before, or has a wrong shape.
        """
        if weight.ndim == 3:
            for number, each in enumerate(weight.unbind()):
                self.take(each, name, matrix, number)
            return
        given = self._given.setdefault(expert, {})
        self._require(weight, matrix, expert, given)
        given[matrix] = name, weight
        if len(given) == len(_MATRICES):
            del self._given[expert]
            self._whole.add(expert)
            if expert not in self._known:
                self._put(expert, self._packed(expert, given))

    def finish(self) -> int:
        """Return the number of experts that were given.

        Raises:
            WeightsError: An expert was not given as a whole.
        """
        for expert, given in sorted(self._given.items()):
            missing = [name for matrix, name in _MATRICES.items() if matrix not in given]
            raise WeightsError(
                f"expert {expert} of {self._layer.layer_name} has no {', '.join(missing)}",
                fix="give all three projections of an expert in one update",
            )
        return len(self._whole)

    def _stand_in(self, before: torch.Tensor) -> torch.nn.Parameter:
        stand_in = torch.nn.Parameter(torch.empty_like(before), requires_grad=False)
        stand_in.weight_loader = self._layer.weight_loader
        return stand_in

    def _require(
        self, weight: torch.Tensor, matrix: str, expert: int, given: Collection[str]
    ) -> None:
        what = f"expert {expert}'s {_MATRICES[matrix]} in {self._layer.layer_name}"
        if expert in self._whole or matrix in given:
            raise WeightsError(f"{what} was given twice", fix="give each weight once")
        if tuple(weight.shape) != self._shapes[matrix]:
            raise WeightsError(
                f"{what} has the shape {[*weight.shape]}, not {[*self._shapes[matrix]]}", fix=SAME
            )
        if weight.is_meta and expert not in self._known:
            raise InvariantError(f"{what} was not read")

    def _packed(self, expert: int, given: dict[str, tuple[str, torch.Tensor]]) -> list[Bytes]:
        """Return an expert's parts in the kernel's layout, uint8 ``[part bytes]`` each."""
        for matrix, (name, weight) in given.items():
            part = self._stage.weights[PARTS[matrix == "w2"]]
            RoutedExperts.weight_loader(self._layer, part, weight, name, matrix, expert, True)
        packed = torch.nn.Module()
        for name, one in self._stage.one.items():
            packed.register_parameter(name, torch.nn.Parameter(one, requires_grad=False))
        # vLLM calls this method after a layer's first loading, but not when the layer is reloaded.
        self._layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(packed)
        return [as_rows(getattr(packed, name))[0] for name in PARTS]
