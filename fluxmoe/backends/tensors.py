"""Weights as bytes, arenas as weights: the two views between torch and the core, no copies."""

from __future__ import annotations

import torch

from fluxmoe.core.types import Bytes
from fluxmoe.errors import UnsupportedError


def as_rows(weight: torch.Tensor) -> Bytes:
    """``[experts, …]`` as uint8 ``[experts, bytes]``.

    Raises:
        UnsupportedError: An expert's weights are not one block of memory.
    """
    if not weight.is_contiguous():
        raise UnsupportedError(
            f"expert weights of strides {weight.stride()} are not one block each"
        )
    rows: Bytes = weight.detach().view(len(weight), -1).view(torch.uint8).numpy()
    return rows


def as_weight(rows: Bytes, like: torch.Tensor) -> torch.Tensor:
    """An arena's uint8 rows as weights ``[slots, …]`` of the shape and dtype of ``like``'s."""
    return torch.from_numpy(rows).view(like.dtype).view(len(rows), *like.shape[1:])
