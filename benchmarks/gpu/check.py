"""Comparison of every kernel on the GPU with the host, bit for bit, within seconds.

    python -m benchmarks gpu check [--json]

The command compares decoded pages with the originals, matrix products of compressed pages with
those of raw pages, gathered pages with copies, and the event rule with one in plain Python.
Products of finite weights are also compared with float64, within a tolerance. The weights are the
difficult ones of the interpreted tests. The command `sanitize` runs this check under
compute-sanitizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import device as gpu
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.types import Geometry
from fluxmoe.cuda.kernels.align import align_blocks
from fluxmoe.cuda.kernels.experts import KernelPart, project
from fluxmoe.cuda.kernels.pages import RawSlots, decode_to_slots, pack_pages
from fluxmoe.cuda.kernels.paging import by_score, gather_pages, resolve_event, upload
from fluxmoe.cuda.kernels.tiles import Tiles, default_tiles
from fluxmoe.stores.codec.fixed4 import Fixed4

N, K, EXPERTS, TOP_K, TOKENS = 256, 512, 4, 2, 70


def main(argv: list[str]) -> None:
    options = gpu.arguments("check", __doc__).parse_args(argv)
    device = gpu.require()
    rows = [*weights_rows(device), *moving_rows(device)]
    gpu.report(options, "kernels against the host", rows)
    if not all(row["passed"] for row in rows):
        raise SystemExit("a kernel is WRONG on this card; see the table")


def kinds() -> Iterator[tuple[str, np.ndarray]]:
    """Make compressible bit patterns ``[EXPERTS, N, K]``."""
    rng = np.random.default_rng(0)
    shape = (EXPERTS, N, K)
    normal = (rng.standard_normal(shape).astype(np.float32) * 0.02).view(np.uint32) >> 16
    strays = rng.integers(0, 65536, shape)
    yield "normal", normal
    yield "strays", np.where(rng.random(shape) < 0.002, strays, normal)
    yield "zeros", np.where(rng.random(shape) < 0.05, rng.integers(0, 2, shape) << 15, normal)
    yield "raw rows", np.where(np.arange(N)[:, None] % 5 == 0, strays, normal)
    yield "constant", np.full(shape, 0x3FC0)


def weights_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    for kind, patterns in kinds():
        words = patterns.astype(np.uint16)
        codec = Fixed4(K)
        blocks = [codec.encode(page.reshape(-1).view(np.uint8)) for page in words]
        packed = pack_pages(blocks, N, K, device)
        raw = torch.from_numpy(words.view(np.int16)).to(device).view(torch.bfloat16)
        target = RawSlots(torch.zeros_like(raw))
        number = torch.arange(EXPERTS, dtype=torch.int32, device=device)
        decode_to_slots(packed, number, number.flip(0), number[-1:] + 1, target)
        same = torch.equal(target.weights.flip(0).view(torch.int16), raw.view(torch.int16))
        yield {"what": f"decode, {kind}", "passed": same}
        for tiles in (default_tiles(1, 8), default_tiles(96, 8), Tiles(16, 64, 256, 1, 4, 2),
                      Tiles(64, 64, 32, 8), default_tiles(1024, 8)):  # fmt: skip
            yield products(raw, packed, kind, tiles, device)


def products(raw: Any, packed: Any, kind: str, tiles: Tiles, device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(TOKENS, K, device=device, generator=generator).bfloat16()
    ids = torch.rand(TOKENS, EXPERTS, device=device, generator=generator).topk(TOP_K).indices.int()
    ids[::7] = -1
    scale = torch.rand(TOKENS, TOP_K, device=device, generator=generator)
    blocks = align_blocks(ids, tiles.block_m, EXPERTS)
    table = torch.arange(EXPERTS, dtype=torch.int32, device=device)
    call = {"top_k": TOP_K, "valid": ids.numel(), "scale": scale}
    plain = project(x, KernelPart(raw=RawSlots(raw)), table, blocks, tiles, **call)
    coded = project(x, KernelPart(compressed=packed), -2 - table, blocks, tiles, **call)
    same = torch.equal(plain.view(torch.int16), coded.view(torch.int16))
    if kind in ("normal", "zeros", "constant"):
        flat = ids.flatten().long()
        want = torch.einsum("rnk,rk->rn", raw[flat.clamp(min=0)].double(),
                            x.double().repeat_interleave(TOP_K, 0))  # fmt: skip
        want *= (scale.flatten() * (flat >= 0))[:, None]
        same &= torch.allclose(
            plain.double(), want, rtol=2**-7, atol=1e-4 * float(want.abs().max())
        )
    size = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
    return {"what": f"products, {kind}, {size}", "passed": same}


def moving_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    host = gpu.pinned(torch.randint(0, 256, (6, 4112), dtype=torch.uint8))
    address = torch.tensor([page.data_ptr() for page in host], device=device)
    arena = torch.zeros(3, 4112, dtype=torch.uint8, device=device)
    pages = torch.tensor([5, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
    gather_pages(address, pages, slots, torch.tensor([2], dtype=torch.int32, device=device), arena)
    want = torch.stack([host[0], torch.zeros_like(host[0]), host[5]])
    yield {"what": "gather", "passed": torch.equal(arena.cpu(), want)}

    rng = np.random.default_rng(0)
    table = PageTable(Geometry(12, 64), [300])
    there, here = upload(table.books, device), upload(table.books, "cpu")
    passed = True
    for _ in range(4):
        order = torch.from_numpy(by_score(rng.integers(0, 50, 12 * 64)))
        there.order.copy_(order)
        scores = np.empty(12 * 64)
        scores[order.numpy()] = np.arange(12 * 64)
        for layer in range(12):
            ids = np.stack([rng.permutation(64)[:8] for _ in range(5)]).astype(np.int32)
            resolve_event(there, layer, torch.from_numpy(ids).to(device))
            plain_event(here, layer, ids, scores)
            for name in ("last_use", "slot_of", "loaded_at", "num_free", "counts", "event"):
                passed &= torch.equal(getattr(there, name).cpu(), getattr(here, name))
    yield {"what": "event rule", "passed": passed}


def plain_event(books: Any, layer: int, ids: np.ndarray, scores: np.ndarray) -> None:
    """Run points 1–5 of the event rule in plain Python on the given books."""
    books.event.add_(1)
    now, first = int(books.event), layer * 64
    asked = [first + int(expert) for expert in np.unique(ids)]
    missing = [page for page in asked if books.slot_of[page] < 0]
    for page in asked:
        books.last_use[page] = now
    resident = [page for page in range(len(scores)) if books.slot_of[page] >= 0]
    others = sorted((scores[page], page) for page in resident if books.last_use[page] != now)
    free = books.free[: int(books.num_free)].tolist()
    short = max(len(missing) - len(free), 0)
    for _, page in others[:short]:
        free.append(int(books.slot_of[page]))
        books.slot_of[page] = -1
    for page in missing:
        books.slot_of[page] = free.pop()
        books.loaded_at[page] = now
    books.free[: len(free)] = torch.tensor(free, dtype=torch.int32)
    books.num_free[0] = len(free)
    books.counts.add_(torch.tensor([len(asked) - len(missing), len(missing), short]))
