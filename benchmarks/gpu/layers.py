"""Random MoE layers with the shapes of real models on the GPU, raw and compressed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from fluxmoe.cuda.kernels.experts import KernelPart
from fluxmoe.cuda.kernels.pages import CompressedPages, RawSlots, pack_pages
from fluxmoe.stores.codec.fixed4 import Fixed4


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer."""

    experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of an expert's matrices w13 and w2."""
        return (2 * self.inner, self.hidden), (self.hidden, self.inner)

    @property
    def expert_bytes(self) -> int:
        """Bytes of an uncompressed expert."""
        return sum(2 * n * k for n, k in self.parts)


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "tiny": Shape(4, 2, 128, 64),
}


@dataclass(frozen=True)
class Layer:
    """w13 and w2 of all experts, raw and compressed; slot and page numbers are expert numbers."""

    shape: Shape
    raw: tuple[KernelPart, KernelPart]
    compressed: tuple[KernelPart, KernelPart]

    @property
    def ratio(self) -> float:
        """Raw bytes per compressed byte."""
        packed = sum(pages(part).data.numel() for part in self.compressed)
        return self.shape.experts * self.shape.expert_bytes / packed


def pages(part: KernelPart) -> CompressedPages:
    assert part.compressed is not None
    return part.compressed


def slots(part: KernelPart) -> RawSlots:
    assert part.raw is not None
    return part.raw


def make(shape: Shape, device: torch.device, seed: int = 0) -> Layer:
    """Make a layer of normally distributed weights with a standard deviation of 0.02."""
    generator = torch.Generator(device).manual_seed(seed)
    raw, compressed = [], []
    for n, k in shape.parts:
        weights = torch.empty(shape.experts, n, k, dtype=torch.bfloat16, device=device)
        weights.normal_(0, 0.02, generator=generator)
        raw.append(KernelPart(raw=RawSlots(weights)))
        compressed.append(KernelPart(compressed=compress(weights)))
    return Layer(shape, (raw[0], raw[1]), (compressed[0], compressed[1]))


def compress(weights: torch.Tensor) -> CompressedPages:
    """Encode weights ``[pages, N, K]`` from the device on the host."""
    count, n, k = weights.shape
    codec = Fixed4(k)

    def block(page: int) -> np.ndarray:
        return codec.encode(weights[page].cpu().view(torch.uint8).numpy().reshape(-1))

    with ThreadPoolExecutor() as pool:
        return pack_pages(list(pool.map(block, range(count))), n, k, weights.device)
