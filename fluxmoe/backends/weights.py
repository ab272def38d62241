"""New weights of a running model as a caller gives them: names and tensors, checked one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import torch

from fluxmoe.errors import WeightsError, meant

Shape: TypeAlias = tuple[int, ...]

#: Remedies for wrong weights.
FORM = "give pairs of name and tensor, named as before paging"
SAME = "give weights of the same architecture"


def checked(
    weights: object,
    shapes: Mapping[str, Shape],
    other: Callable[[str, torch.Tensor], Shape | None] = lambda *_: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and tensor of each weight that fits.

    Args:
        weights: Pairs of name and tensor, or a map.
        shapes: Shapes of the model's weights, by name.
        other: Returns the shape for a name not in ``shapes``; None if it is not known.

    Raises:
        WeightsError: A weight does not fit, or is given twice.
    """
    if isinstance(weights, Mapping):
        weights = weights.items()
    if not isinstance(weights, Iterable):
        raise WeightsError(f"weights of type {type(weights).__name__}", fix=FORM)
    given = set()
    for pair in weights:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise WeightsError(f"a weight is a {type(pair).__name__}", fix=FORM)
        name, weight = pair
        if not isinstance(weight, torch.Tensor):
            raise WeightsError(f"{name} has no tensor", fix=FORM)
        if name in given:
            raise WeightsError(f"{name} was given twice", fix="give each weight once")
        expected = shapes[name] if name in shapes else other(name, weight)
        if expected is None:
            fix = meant(name, shapes) or FORM
            raise WeightsError(f"{name} is no weight of this model", fix=fix)
        if weight.shape != expected:
            raise WeightsError(
                f"{name} has the shape {[*weight.shape]}, not {[*expected]}", fix=SAME
            )
        if weight.device.type != "cpu":
            raise WeightsError(f"{name} is on {weight.device}", fix="move it to the CPU")
        given.add(name)
        yield name, weight
