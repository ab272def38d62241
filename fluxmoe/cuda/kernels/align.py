"""Sorting of tokens by expert into whole blocks, as in stock vLLM's ``moe_align_block_size``.

The code is plain torch and does not synchronise with the host: all shapes depend only on input
shapes. Within vLLM, vLLM's own operator computes the same arrays in one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """Rows of the two products, in blocks of one expert each. All arrays are int32.

    ``rows`` ``[blocks * block]`` are indices into the flattened ``[tokens, top_k]`` ids; padding
    rows have the number of ids instead. ``experts`` ``[blocks]`` is the *logical* expert of each
    block. ``padded`` ``[1]`` is the number of rows in use; later rows are not computed.
    """

    rows: torch.Tensor
    experts: torch.Tensor
    padded: torch.Tensor


def align_blocks(ids: torch.Tensor, block: int, experts: int) -> Blocks:
    """Sort the routed expert ids of a batch by expert.

    Args:
        ids: ``[tokens, top_k]`` int32 or int64, logical expert ids; negative ids are padding of the
            batch and get no row.
        block: Number of rows per block (``Tiles.block_m``).
        experts: Number of experts of the layer.
    """
    flat = ids.reshape(-1).long()
    count = flat.numel()
    flat = torch.where(flat < 0, experts, flat)
    routed = torch.zeros(experts + 1, dtype=torch.long, device=ids.device)
    routed.scatter_add_(0, flat, torch.ones_like(flat))
    ends = ((routed[:experts] + block - 1) // block * block).cumsum(0)
    begins = torch.cat([torch.zeros_like(ends[:1]), ends])

    most = min(count * block, count + experts * (block - 1))
    size = -(-most // block) * block
    order = flat.argsort(stable=True)
    expert = flat[order]
    rank = torch.arange(count, device=ids.device) - (routed.cumsum(0) - routed)[expert]
    place = torch.where(expert < experts, begins[expert] + rank, size)  # padding: past the end
    rows = torch.full((size + 1,), count, dtype=torch.int32, device=ids.device)
    rows.scatter_(0, place, order.int())

    first = torch.arange(0, size, block, device=ids.device)
    owner = torch.searchsorted(ends, first, right=True).clamp_(max=experts - 1)
    return Blocks(rows[:size], owner.int(), ends[-1:].int())
