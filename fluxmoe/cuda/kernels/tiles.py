"""Tile sizes of the fused MoE kernel: those of stock vLLM, to keep its order of summation.

Summing over K in a different number of steps rounds differently, so tiles are chosen from the same
inputs as in stock vLLM (tokens, and experts of the *layer*), never from the number of slots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxmoe.errors import ConfigError

_KEYS = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
}


@dataclass(frozen=True, slots=True)
class Tiles:
    """One launch configuration.

    Blocks of ``block_m`` tokens by ``block_n`` outputs, summed over ``block_k`` inputs at a time;
    ``group_m`` neighbouring row blocks share weight tiles in the L2 cache.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 1
    num_warps: int = 4
    num_stages: int = 3


def default_tiles(tokens: int, experts: int) -> Tiles:
    """Return stock vLLM's tiles for bf16 without a tuned table (0.32, ``get_default_config``).

    Args:
        tokens: Number of tokens in the batch, before top-k.
        experts: Number of experts of the layer, resident or not.
    """
    if tokens <= 32:
        block_m = 16
    elif tokens <= 96:
        block_m = 32
    elif tokens <= 512:
        block_m = 64
    else:
        block_m = 128
    return Tiles(
        block_m=block_m,
        block_n=64 if tokens <= 64 else 128,
        block_k=128 if tokens <= 64 else 64,
        group_m=16 if tokens // max(experts, 1) > 128 else 1,
        num_warps=4 if tokens <= 128 else 8,
        num_stages=4 if tokens <= 32 else 3,
    )


def read_table(path: Path) -> dict[int, Tiles]:
    """Read a tuned table (batch size → tiles) in stock vLLM's JSON format.

    Raises:
        ConfigError: The file is missing, is not a valid table, or lacks a key.
    """
    try:
        table = json.loads(path.read_text())
        table.pop("triton_version", None)
        return {
            int(tokens): Tiles(**{ours: int(row[key]) for key, ours in _KEYS.items()})
            for tokens, row in table.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"not a table of tile sizes: {error!r}",
            where=str(path),
            fix=f"use a JSON object: batch size → object with {', '.join(_KEYS)}",
        ) from error


def tiles_for(tokens: int, experts: int, table: Mapping[int, Tiles] | None = None) -> Tiles:
    """Return stock vLLM's tiles for a batch: the table's nearest entry, or default tiles."""
    if table:
        return table[min(table, key=lambda size: abs(size - tokens))]
    return default_tiles(tokens, experts)
