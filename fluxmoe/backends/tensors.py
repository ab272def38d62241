"""Views of torch weights as bytes and of arenas as weights, without copies; sizes of pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fluxmoe.core.types import Bytes, Geometry, PageClass, Part
from fluxmoe.errors import UnsupportedError


def pages_of(layers: Sequence[Any], names: Sequence[str]) -> tuple[Geometry, PageClass]:
    """Return the sizes of layers' experts. Raises UnsupportedError if the layouts differ.

    Args:
        layers: MoE layers.
        names: Names of their parameters that hold experts, ``[experts, …]``.
    """
    layouts = {tuple((getattr(m, n).shape, getattr(m, n).dtype) for n in names) for m in layers}
    if len(layouts) > 1:
        raise UnsupportedError(f"the layers have experts with {len(layouts)} different layouts")
    weights = {name: getattr(layers[0], name) for name in names}
    parts = (Part(n, w.nbytes // len(w), w.numel() // len(w)) for n, w in weights.items())
    return Geometry(len(layers), len(weights[names[0]])), PageClass(tuple(parts))


def as_rows(weight: torch.Tensor) -> Bytes:
    """View weights ``[experts, …]`` as uint8 ``[experts, bytes]``.

    Raises:
        UnsupportedError: The weights are not contiguous.
    """
    if not weight.is_contiguous():
        raise UnsupportedError(f"expert weights with strides {weight.stride()} are not contiguous")
    rows: Bytes = weight.detach().view(len(weight), -1).view(torch.uint8).numpy()
    return rows


def as_weight(rows: Bytes, like: torch.Tensor) -> torch.Tensor:
    """View an arena's uint8 rows as weights ``[slots, …]`` with the shape and dtype of ``like``."""
    return torch.from_numpy(rows).view(like.dtype).view(len(rows), *like.shape[1:])
