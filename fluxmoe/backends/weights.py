"""Checks of the names and tensors that a caller gives as new weights of a running model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import torch

from fluxmoe.errors import WeightsError, meant

Shape: TypeAlias = tuple[int, ...]

#: Remedies for wrong weights.
FORM = "give pairs of a name and a tensor, with the names used before paging"
SAME = "give weights of the same architecture"


def checked(
    weights: object,
    shapes: Mapping[str, Shape],
    other: Callable[[str, torch.Tensor], Shape | None] = lambda *_: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Check each weight, and yield its name and a copy, because an iterator may reuse its tensors.

    Args:
        weights: Pairs of a name and a tensor, or a map from names to tensors.
        shapes: Shapes of the model's weights, by name.
        other: Function that returns the shape of a weight whose name is not in ``shapes``, or None
            if the name is unknown.

    Raises:
        WeightsError: A weight does not fit the model, or is given twice.
    """
    if isinstance(weights, Mapping):
        weights = weights.items()
    if not isinstance(weights, Iterable):
        raise WeightsError(f"the weights are of type {type(weights).__name__}", fix=FORM)
    given = set()
    for pair in weights:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise WeightsError(f"an item is of type {type(pair).__name__}, not a pair", fix=FORM)
        name, weight = pair
        if not isinstance(weight, torch.Tensor):
            raise WeightsError(f"{name} is of type {type(weight).__name__}, not a tensor", fix=FORM)
        if name in given:
            raise WeightsError(f"{name} was given twice", fix="give each weight once")
        expected = shapes[name] if name in shapes else other(name, weight)
        if expected is None:
            fix = meant(name, shapes) or FORM
            raise WeightsError(f"this model has no weight {name}", fix=fix)
        if weight.shape != expected:
            raise WeightsError(
                f"{name} has the shape {[*weight.shape]}, not {[*expected]}", fix=SAME
            )
        if weight.device.type != "cpu":
            raise WeightsError(f"{name} is on {weight.device}", fix="move it to the CPU")
        if weight.layout != torch.strided or weight.is_quantized or weight.is_complex():
            raise WeightsError(
                f"{name} is a {weight.layout} tensor of {weight.dtype}",
                fix="give dense real numbers",
            )
        given.add(name)
        yield name, weight.detach().clone()
