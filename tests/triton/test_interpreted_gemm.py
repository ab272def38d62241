"""Both projections: raw compared with float64, and compressed compared with raw bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxmoe.cuda.kernels.align import align_blocks
from fluxmoe.cuda.kernels.experts import ABSENT, KernelPart, page_entry, project, run_experts
from fluxmoe.cuda.kernels.tiles import Tiles, default_tiles
from fluxmoe.errors import UnsupportedError
from tests.triton.weights import bits, compressed, kinds, raw_slots, weights

# Weights of all patterns overflow, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

TILES = {
    "decode": Tiles(16, 64, 128),
    "narrow": Tiles(16, 32, 64),
    "wide": Tiles(16, 128, 128, 4),
    "deep": Tiles(16, 64, 256),
    "middle": Tiles(64, 128, 64, 8),
    "batch-invariant": Tiles(64, 64, 32, 8),
    "large": Tiles(32, 256, 64, 16),
}


def batch(tokens, experts, top_k, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator).bfloat16()
    scores = torch.rand(tokens, experts, generator=generator)
    ids = scores.topk(top_k, dim=1).indices.int()
    return x, ids, torch.rand(tokens, top_k, generator=generator)


def exact(x, matrices, ids, top_k, scale=None):
    """Compute ``[rows, N]`` in float64; padding rows are 0."""
    rows = []
    for row, expert in enumerate(ids.flatten().tolist()):
        if expert < 0:
            rows.append(torch.zeros(matrices.shape[1], dtype=torch.float64))
            continue
        out = matrices[expert].double() @ x[row // top_k].double()
        rows.append(out if scale is None else out * scale.flatten()[row].double())
    return torch.stack(rows)


def close(got, want):
    """Assert equality within a unit of bf16 (the interpreter truncates) and rounding of sums."""
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-5 * float(want.abs().max()))


def both(w, ids, x, tiles, top_k, scale=None, table=None):
    table = torch.arange(len(w), dtype=torch.int32) if table is None else table
    blocks = align_blocks(ids, tiles.block_m, len(table))
    call = dict(top_k=top_k, valid=ids.numel(), scale=scale)
    raw = project(x, KernelPart(raw=raw_slots(w)), table, blocks, tiles, **call)
    pages = -2 - table
    return raw, project(x, KernelPart(compressed=compressed(w)), pages, blocks, tiles, **call)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize(("n", "k", "scaled"), [(192, 320, True), (64, 64, False)])
def test_products_against_float64(tiles, n, k, scaled):
    _, w = next(weights((3, n, k)))
    x, ids, scale = batch(7, 3, 2, k)
    factor = scale if scaled else None
    raw, in_place = both(w, ids, x, tiles, 2, factor)
    close(raw, exact(x, raw_slots(w).weights, ids, 2, factor))
    assert torch.equal(bits(raw), bits(in_place))


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("tiles", ["decode", "middle", "deep", "batch-invariant"])
def test_compressed_gives_the_bits_of_raw(kind, tiles):
    shape = (2, 128, 320)
    w = dict(weights(shape))[kind]
    x, ids, scale = batch(5, 2, 1, shape[2])
    raw, in_place = both(w, ids, x, TILES[tiles], 1, scale)
    assert torch.equal(bits(raw), bits(in_place))


def test_experts_are_found_through_the_table():
    _, w = next(weights((4, 64, 128)))
    x, ids, _ = batch(6, 3, 2, 128)
    slots = torch.tensor([3, 0, 2], dtype=torch.int32)
    raw, in_place = both(w, ids, x, TILES["decode"], 2, table=slots)
    close(raw, exact(x, raw_slots(w).weights[slots.long()], ids, 2))
    assert torch.equal(bits(raw), bits(in_place))


def test_raw_and_compressed_experts_of_one_layer():
    _, w = next(weights((4, 64, 128)))
    x, ids, _ = batch(9, 4, 2, 128)
    tiles = TILES["decode"]
    blocks = align_blocks(ids, tiles.block_m, 4)
    table = torch.tensor([0, page_entry(1), 2, page_entry(3)], dtype=torch.int32)
    part = KernelPart(raw_slots(w), compressed(w))
    mixed = project(x, part, table, blocks, tiles, top_k=2, valid=ids.numel())
    raw, _ = both(w, ids, x, tiles, 2)
    assert torch.equal(bits(mixed), bits(raw))


@pytest.mark.parametrize("variant", ["raw", "compressed"])
def test_an_absent_expert_is_loud(variant):
    _, w = next(weights((2, 64, 64)))
    x, _, _ = batch(3, 2, 1, 64)
    ids = torch.tensor([[0], [1], [0]], dtype=torch.int32)
    part = (
        KernelPart(raw=raw_slots(w)) if variant == "raw" else KernelPart(compressed=compressed(w))
    )
    here = 0 if variant == "raw" else page_entry(0)
    table = torch.tensor([here, ABSENT], dtype=torch.int32)
    blocks = align_blocks(ids, 16, 2)
    out = project(x, part, table, blocks, Tiles(16, 64, 64), top_k=1, valid=3)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_padding_rows_and_experts_without_tokens():
    _, w = next(weights((5, 64, 128)))
    x, _, _ = batch(4, 5, 2, 128)
    ids = torch.tensor([[4, 1], [-1, -1], [1, 4], [-1, -1]], dtype=torch.int32)
    raw, in_place = both(w, ids, x, TILES["decode"], 2)
    close(raw, exact(x, raw_slots(w).weights, ids, 2))
    assert not raw[[2, 3, 6, 7]].any()
    assert torch.equal(bits(raw), bits(in_place))


def test_a_batch_of_padding_only():
    _, w = next(weights((2, 64, 64)))
    x, _, _ = batch(2, 2, 1, 64)
    ids = torch.full((2, 1), -1, dtype=torch.int32)
    for out in both(w, ids, x, TILES["decode"], 1):
        assert not out.any()


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_whole_layer(tokens):
    experts, hidden, inner, top_k = 6, 128, 64, 3
    _, first = next(weights((experts, 2 * inner, hidden)))
    _, second = next(weights((experts, hidden, inner)))
    x, ids, scale = batch(tokens, experts, top_k, hidden)
    table = torch.arange(experts, dtype=torch.int32)
    tiles = default_tiles(tokens, experts)
    raw = [KernelPart(raw=raw_slots(w)) for w in (first, second)]
    packed = [KernelPart(compressed=compressed(w)) for w in (first, second)]
    out = run_experts(x, *raw, table, scale, ids, tiles)
    assert torch.equal(bits(out), bits(run_experts(x, *packed, -2 - table, scale, ids, tiles)))

    gate, up = exact(x, raw[0].raw.weights, ids, top_k).chunk(2, dim=1)
    middle = torch.nn.functional.silu(gate) * up
    want = exact(middle, raw[1].raw.weights, ids, 1, scale).view(tokens, top_k, hidden).sum(1)
    torch.testing.assert_close(out.double(), want, rtol=2**-5, atol=2e-2 * float(want.abs().max()))


def test_huge_values_overflow_alike():
    shape = (2, 64, 128)
    w = np.where(np.arange(128) % 2 == 0, 0x7F7F, 0xFF7F).astype(np.uint16)
    w = np.broadcast_to(w, shape).copy()
    x, ids, _ = batch(3, 2, 1, 128)
    raw, in_place = both(w, ids, x * 1e30, TILES["decode"], 1)
    assert not raw.isfinite().all()
    assert torch.equal(bits(raw), bits(in_place))


def test_what_cannot_be_read_is_refused():
    _, w = next(weights((1, 64, 64)))
    x, ids, _ = batch(2, 1, 1, 64)
    table, tiles = torch.zeros(1, dtype=torch.int32), TILES["decode"]
    blocks = align_blocks(ids, 16, 1)
    call = dict(top_k=1, valid=2)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        project(x.float(), KernelPart(raw=raw_slots(w)), table, blocks, tiles, **call)
    with pytest.raises(UnsupportedError, match="columns"):
        project(x[:, :32], KernelPart(raw=raw_slots(w)), table, blocks, tiles, **call)
    for scale in (torch.ones(2).bfloat16(), torch.ones(4)[::2]):
        with pytest.raises(UnsupportedError, match="float32"):
            project(x, KernelPart(raw=raw_slots(w)), table, blocks, tiles, scale=scale, **call)
    with pytest.raises(UnsupportedError, match=r"one number of rows, not \[\]"):
        project(x, KernelPart(), table, blocks, tiles, **call)
    odd = compressed(next(weights((1, 70, 64)))[1])
    with pytest.raises(UnsupportedError, match="multiples of 64"):
        project(x, KernelPart(compressed=odd), table, blocks, tiles, **call)
