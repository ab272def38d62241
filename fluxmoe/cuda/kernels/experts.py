"""The experts of one MoE layer, computed by the kernels: both projections over paged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from fluxmoe.cuda.kernels.align import Blocks, align_blocks
from fluxmoe.cuda.kernels.gemm import grouped_gemm_kernel
from fluxmoe.cuda.kernels.language import triton
from fluxmoe.cuda.kernels.pages import CompressedPages, RawSlots
from fluxmoe.cuda.kernels.tiles import Tiles
from fluxmoe.errors import UnsupportedError
from fluxmoe.stores.codec.fixed4 import Layout

#: Entry of absent experts in the kernels' expert table.
ABSENT = -1


@dataclass(frozen=True, slots=True)
class KernelPart:
    """Weights of one part (w13 or w2) of a layer's experts, raw, compressed or both."""

    raw: RawSlots | None = None
    compressed: CompressedPages | None = None


def most_registers(tiles: Tiles) -> int:
    """Return the register limit of a decoding thread: all registers that are available to it.

    By default, the assembler spills some registers to fit one more block per multiprocessor.
    """
    return min(255, 65536 // (32 * tiles.num_warps) // 8 * 8)


def page_entry(page: int) -> int:
    """Return the entry of compressed page ``page`` in the kernels' expert table.

    Entries of raw slots are ≥ 0.
    """
    return -2 - page


def run_experts(
    x: torch.Tensor,
    w13: KernelPart,
    w2: KernelPart,
    table: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    tiles: Tiles,
    *,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute ``sum over k of topk_weights · (act(x @ w13.T) @ w2.T)``, rounding like stock vLLM.

    Args:
        x: ``[tokens, H]`` bfloat16, dense.
        w13: Matrices ``[2I, H]``.
        w2: Matrices ``[H, I]``.
        table: ``[experts]`` int32: raw slot ≥ 0, ``ABSENT``, or ``page_entry``.
        topk_weights: ``[tokens, top_k]`` float32.
        topk_ids: ``[tokens, top_k]`` integers, logical experts; negative for padding rows.
        tiles: Result of ``tiles_for(tokens, experts)``.
        activation: ``[rows, 2I] → [rows, I]``; by default SiLU of the first half, rounded, times
            the second half, like vLLM's ``silu_and_mul``. Within vLLM, pass vLLM's operator.
        reduce: ``[tokens, top_k, H] → [tokens, H]``; by default torch's sum. Within vLLM, pass
            vLLM's operator.

    Raises:
        UnsupportedError: The kernels do not support a dtype or layout.
    """
    tokens, top_k = topk_ids.shape
    blocks = align_blocks(topk_ids, tiles.block_m, table.numel())
    first = project(x, w13, table, blocks, tiles, top_k=top_k, valid=tokens * top_k)
    middle = (activation or silu_and_mul)(first)
    second = project(
        middle, w2, table, blocks, tiles, top_k=1, valid=tokens * top_k, scale=topk_weights
    )
    return (reduce or _sum)(second.view(tokens, top_k, -1))


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute the SiLU of the left half, rounded to the dtype, times the right half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def _sum(parts: torch.Tensor) -> torch.Tensor:
    return parts.sum(1)


def project(
    x: torch.Tensor,
    part: KernelPart,
    table: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
    *,
    top_k: int,
    valid: int,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute one projection of every routed row: ``[valid, N]`` bfloat16, 0 for padding rows.

    Args:
        x: ``[valid / top_k, K]`` bfloat16.
        part: The weights; raw and compressed weights need one launch each.
        table: As in ``run_experts``.
        blocks: Result of ``align_blocks`` with ``tiles.block_m``.
        tiles: Launch configuration.
        top_k: Number of rows that share a row of ``x``.
        valid: Number of rows: tokens times the layer's top-k.
        scale: Factors of the rows, ``valid`` float32 numbers, applied before rounding.

    Raises:
        UnsupportedError: The kernel does not support a dtype or layout.
    """
    sides = [side for side in (part.raw, part.compressed) if side is not None]
    outputs = {_shape(side)[0] for side in sides}
    if len(outputs) != 1:
        raise UnsupportedError(
            f"a part needs weights with one number of rows, not {sorted(outputs)}"
        )
    if x.dtype != torch.bfloat16 or x.stride(-1) != 1:
        raise UnsupportedError(
            f"inputs must be dense bfloat16, not {x.dtype} with strides {x.stride()}"
        )
    if scale is not None and (scale.dtype != torch.float32 or not scale.is_contiguous()):
        raise UnsupportedError(
            f"router weights must be dense float32, not {scale.dtype} with strides {scale.stride()}"
        )
    out = torch.zeros(valid, outputs.pop(), dtype=torch.bfloat16, device=x.device)
    for side in sides:
        _launch(x, side, table, blocks, tiles, top_k, scale, out)
    return out


def _shape(side: RawSlots | CompressedPages) -> tuple[int, int]:
    if isinstance(side, CompressedPages):
        return side.rows, side.cols
    return side.weights.shape[1], side.weights.shape[2]


def _launch(
    x: torch.Tensor,
    side: RawSlots | CompressedPages,
    table: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
    top_k: int,
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    n, k = _shape(side)
    if x.shape[1] != k:
        raise UnsupportedError(f"inputs have {x.shape[1]} columns, weights have {k}")
    if isinstance(side, CompressedPages):
        if n % 64 or k % 64:
            raise UnsupportedError(
                f"a compressed matrix of {n} × {k} cannot be read in place",
                fix="use sizes that are multiples of 64, or decode it to a slot",
            )
        place = Layout(n, k)
        words, offsets, stride = side.data.view(torch.int32), side.offsets, 0
        sections = place.headers, place.flags, place.pool
        flags, registers = side.data, most_registers(tiles)
    else:
        if side.weights.dtype != torch.bfloat16 or not side.weights[0].is_contiguous():
            raise UnsupportedError(
                f"raw slots must be dense bfloat16 matrices, not {side.weights.dtype} "
                f"with strides {side.weights.stride()}"
            )
        words = flags = side.weights
        offsets, stride, sections = table, side.weights.stride(0), (0, 0, 0)
        registers = None
    size = blocks.rows.numel()
    grid = (triton.cdiv(size, tiles.block_m) * triton.cdiv(n, tiles.block_n),)
    grouped_gemm_kernel[grid](
        x, words, flags, offsets, out, out if scale is None else scale, table,
        blocks.rows, blocks.experts, blocks.padded,
        n, k, size, out.shape[0], x.stride(0), stride, out.stride(0), *sections,
        COMPRESSED=isinstance(side, CompressedPages), TOP_K=top_k, SCALE=scale is not None,
        EVEN_K=k % tiles.block_k == 0,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=registers,
    )  # fmt: skip
