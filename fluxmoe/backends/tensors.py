"""Zero-copy views between torch and the core: weights as bytes, arenas as weights."""

from __future__ import annotations

import torch

from fluxmoe.core.types import Bytes
from fluxmoe.errors import UnsupportedError


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
