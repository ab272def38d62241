"""New weights of a paged model, all of which are checked before any is applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.torch import layout
from fluxmoe.backends.torch.weights.sealed import Shared
from fluxmoe.backends.weights import checked
from fluxmoe.core.transfer.store import Put
from fluxmoe.core.types import Bytes
from fluxmoe.errors import WeightsError


class NewWeights:
    """New weights of a model, by the names of its ``state_dict``.

    Args:
        model: The paged model.
        layers: Its expert layers, in order.

    Attributes:
        others: Tensors of the model other than its experts, each with its new values.
        experts: Layer → new rows of its experts, uint8 ``[experts, part bytes]`` per part.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
        tensors = (*model.named_parameters(remove_duplicate=False),
                   *model.named_buffers(remove_duplicate=False))  # fmt: skip
        self._tensors = dict(tensors)
        names = Counter(map(id, self._tensors.values()))
        #: Ids of tensors that have several names.
        self._tied = {key for key, count in names.items() if count > 1}
        self._places = {
            id(weight): (index, part)
            for index, layer in enumerate(layers)
            for part, weight in layout.weights_of(layer).items()
        }
        self.others: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.experts: dict[int, list[Bytes]] = {}

    def take_over(self, own: Sequence[Sequence[Bytes]], shared: Sequence[Shared]) -> None:
        """Write the new values to the other tensors, and to the experts that ``close`` restores.

        Args:
            own: Rows of the model's own experts, by layer and part; empty if the model has none.
            shared: Weights whose memory is shared with views from before paging.
        """
        with torch.inference_mode():
            for tensor, values in self.others:
                tensor.copy_(values)
        for layer, parts in self.experts.items() if own else ():
            for rows, part in zip(own[layer], parts, strict=True):
                np.copyto(rows, part)
        for weight in shared:
            weight.updated(self.experts)

    def collect(self, weights: object, put: Put) -> None:
        """Check all weights, and pass the pages of experts to ``put``.

        Raises:
            WeightsError: The weights do not fit the model.
        """
        parts: dict[int, dict[str, Bytes]] = {}
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        values: dict[int, tuple[str, torch.Tensor]] = {}
        for name, new in checked(weights, shapes):
            old = self._tensors[name]
            if id(old) in self._tied:
                # Compared as bytes, because NaN is not equal to NaN.
                value = new.to(old.dtype).contiguous().reshape(-1).view(torch.uint8)
                first, same = values.setdefault(id(old), (name, value))
                if not torch.equal(value, same):
                    raise WeightsError(
                        f"{first} and {name} are the same tensor, but have different values",
                        fix="give one of them, or equal values",
                    )
            if id(old) not in self._places:
                self.others.append((old, new))
                continue
            layer, part = self._places[id(old)]
            parts.setdefault(layer, {})[part] = as_rows(new.to(old.dtype).contiguous())
            if len(parts[layer]) < len(layout.PARTS):
                continue
            found = parts.pop(layer)
            rows = self.experts[layer] = [found[part] for part in layout.PARTS]
            for expert in range(len(rows[0])):
                put(layer * len(rows[0]) + expert, [each[expert] for each in rows])
        for layer, found in parts.items():
            (missing,) = set(layout.PARTS) - found.keys()
            raise WeightsError(
                f"the experts of MoE layer {layer} have no {missing}",
                fix=f"give {' and '.join(layout.PARTS)} in one update",
            )
