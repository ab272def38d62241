"""The number of slots that vLLM's CPU kernel can address in one call."""

from __future__ import annotations

import torch

from fluxmoe.errors import InvariantError

# cpu_fused_moe computes slot * elements, the start of a slot, in a signed 32-bit integer, and
# silently reads unrelated memory after an overflow (docs/project/adr/0001).
INDEX_LIMIT = 2**31


def bank_limit(part_elements: int) -> int:
    """Compute the maximum number of slots that one ``cpu_fused_moe`` call can address.

    Args:
        part_elements: Number of weights in the largest part of one expert (2·I·H for w13).
    """
    return (INDEX_LIMIT - 1) // part_elements + 1


def require_addressable(arena: torch.Tensor) -> torch.Tensor:
    """Reject an arena ``[slots, …]`` whose last slots the kernel could not address.

    Raises:
        InvariantError: The arena has more slots than ``bank_limit`` allows.
    """
    limit = bank_limit(arena[0].numel())
    if len(arena) > limit:
        raise InvariantError(
            f"a bank of {len(arena)} slots of {arena[0].numel()} weights: "
            f"cpu_fused_moe can address {limit}"
        )
    return arena
