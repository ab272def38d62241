"""Time of both projections of a layer: raw, compressed in place, decoded first, and stock vLLM.

    python -m benchmarks gpu kernel [--shape NAME] [--tokens 1,8,64,…] [--tiles FILE] [--save FILE]

Each row is one batch with uniformly random routing. All variants get the same sorted blocks and
tiles (stock defaults, or a tuned table). The activation is timed; alignment and the sum over top-k,
which are the same for all variants, are not. ``to_slot`` decodes every routed expert into a slot
and then runs the raw kernel. ``identical`` is true if the results of all variants are equal bit for
bit. ``chosen`` is the variant that `choose` returns if no page is raw and there are slots for all
experts; its target is at most 1.05 times the time of stock (or of raw, if vLLM cannot be imported)
up to 64 tokens per expert, and 1.1 times above that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import device as gpu
from benchmarks.gpu.layers import SHAPES, Layer, make, pages, slots
from fluxmoe.cuda.kernels.align import Blocks, align_blocks
from fluxmoe.cuda.kernels.choice import Variant, choose
from fluxmoe.cuda.kernels.experts import KernelPart, project, silu_and_mul
from fluxmoe.cuda.kernels.pages import RawSlots, decode_to_slots
from fluxmoe.cuda.kernels.tiles import Tiles, read_table, tiles_for

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
Run = Callable[[], torch.Tensor]


def main(argv: list[str]) -> None:
    parser = gpu.arguments("kernel", __doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all but tiny")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="comma-separated")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tiles", type=Path, help="vLLM's tuned table for the shape and card")
    options = parser.parse_args(argv)
    device = gpu.require()
    table = read_table(options.tiles) if options.tiles else None
    timer = gpu.Timer(options.repeats)
    rows: list[dict[str, Any]] = []
    for name in options.shape or [name for name in SHAPES if name != "tiny"]:
        layer = make(SHAPES[name], device)
        for tokens in options.tokens:
            rows.append({"shape": name} | measure(layer, tokens, timer, table))
        del layer
    gpu.report(options, "both projections of a layer, µs", rows)
    if not all(row["identical"] for row in rows):
        raise SystemExit("results are NOT identical; see the table")


def numbers(text: str) -> list[int]:
    """Parse ``1,8,64`` into integers."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1,8,64")
    return found


def measure(
    layer: Layer, tokens: int, timer: gpu.Timer, table: dict[int, Tiles] | None
) -> dict[str, Any]:
    """Measure one row of the table."""
    shape, device = layer.shape, slots(layer.raw[0]).weights.device
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
    scores = torch.rand(tokens, shape.experts, device=device, generator=generator)
    top = scores.topk(shape.top_k, dim=1)
    ids, weights = top.indices.int(), top.values
    tiles = tiles_for(tokens, shape.experts, table)
    blocks = align_blocks(ids, tiles.block_m, shape.experts)
    routed = torch.unique(ids).int()
    experts = torch.arange(shape.experts, dtype=torch.int32, device=device)

    def run(parts: tuple[KernelPart, KernelPart], entries: torch.Tensor) -> torch.Tensor:
        call = {"valid": ids.numel()}
        first = project(x, parts[0], entries, blocks, tiles, top_k=shape.top_k, **call)
        middle = silu_and_mul(first)
        return project(middle, parts[1], entries, blocks, tiles, top_k=1, scale=weights, **call)

    room = [torch.empty_like(slots(part).weights) for part in layer.raw]
    target = (KernelPart(raw=RawSlots(room[0])), KernelPart(raw=RawSlots(room[1])))
    count = torch.tensor([routed.numel()], dtype=torch.int32, device=device)

    def to_slot() -> torch.Tensor:
        for part, goal in zip(layer.compressed, target, strict=True):
            decode_to_slots(pages(part), routed, routed, count, slots(goal))
        return run(target, experts)

    variants: dict[str, Run | None] = {
        "raw": lambda: run(layer.raw, experts),
        "in_place": lambda: run(layer.compressed, -2 - experts),
        "to_slot": to_slot,
        "vllm": vllm_stock(layer, x, ids, weights, tiles, blocks),
    }
    want = variants["raw"]().view(torch.int16)  # type: ignore[misc]
    identical = all(torch.equal(run().view(torch.int16), want) for run in variants.values() if run)
    times = {name: timer(run) if run else None for name, run in variants.items()}
    chosen = choose(
        tokens, shape.top_k, routed.numel(), raw_resident=False, free_slots=shape.experts
    )
    picked = times["in_place" if chosen is Variant.IN_PLACE else "to_slot"]
    touched = routed.numel() * shape.expert_bytes
    assert times["raw"] and times["in_place"] and picked
    return {
        "tokens": tokens,
        "per_expert": round(ids.numel() / routed.numel(), 1),
        "tiles": f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}",
        **times,
        "in_place/raw": times["in_place"] / times["raw"],
        "chosen": str(chosen),
        "chosen/stock": picked / (times["vllm"] or times["raw"]),
        "raw_gb_s": touched / times["raw"] / 1e3,
        "in_place_gb_s": touched / layer.ratio / times["in_place"] / 1e3,
        "identical": identical,
    }


def vllm_stock(
    layer: Layer,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tiles: Tiles,
    blocks: Blocks,
) -> Run | None:
    """Make a function that runs the same two products with vLLM's kernel, if this is possible."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_moe as stock
        from vllm.triton_utils import HAS_TRITON
    except ImportError:
        return None
    if not HAS_TRITON:  # this build of vLLM is for another device
        return None
    top_k, rows = layer.shape.top_k, ids.numel()
    config = {
        "BLOCK_SIZE_M": tiles.block_m,
        "BLOCK_SIZE_N": tiles.block_n,
        "BLOCK_SIZE_K": tiles.block_k,
        "GROUP_SIZE_M": tiles.group_m,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    plain = dict.fromkeys(
        ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant"),
        False,
    )

    def product(
        a: torch.Tensor, w: torch.Tensor, scale: torch.Tensor | None, k: int
    ) -> torch.Tensor:
        out = torch.zeros(len(ids), top_k, w.shape[1], dtype=x.dtype, device=x.device)
        stock.invoke_fused_moe_triton_kernel(
            a, w, out, None, None, scale, blocks.rows, blocks.experts, blocks.padded,
            scale is not None, k, config, compute_type=stock.tl.bfloat16, **plain,
        )  # fmt: skip
        return out.view(rows, -1)

    def run() -> torch.Tensor:
        first = product(x, slots(layer.raw[0]).weights, None, top_k)
        return product(silu_and_mul(first), slots(layer.raw[1]).weights, weights, 1)

    return run
