"""Weights that are difficult for a lossless code, and pages of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from fluxmoe.cuda.kernels.pages import CompressedPages, RawSlots
from fluxmoe.stores.codec.fixed4 import Fixed4
from tests.stores import reference

U16 = npt.NDArray[np.uint16]

PATTERNS = np.arange(65536, dtype=np.uint16)


def patterns(values: npt.ArrayLike) -> U16:
    """Truncate floats to bf16 bit patterns."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def kinds() -> dict[str, str]:
    """List the names of all kinds, for parametrisation."""
    return {name: name for name, _ in weights((1, 64, 64))}


def weights(shape: tuple[int, ...]) -> Iterator[tuple[str, U16]]:
    """Yield each kind with its bit patterns, which have shape ``shape``."""
    rng = np.random.default_rng(len(shape) + sum(shape))
    size = int(np.prod(shape))
    normal = patterns(rng.standard_normal(shape) * 0.02)

    def some(share: float) -> npt.NDArray[np.bool_]:
        return rng.random(shape) < share

    yield "normal", normal
    yield "heavy-tailed", patterns(rng.standard_t(2, shape))
    yield "two per cent zeros", np.where(some(0.02), np.where(some(0.2), 0x8000, 0), normal)
    yield "all zero", np.zeros(shape, np.uint16)
    yield "constant", np.full(shape, 0x3FC0, np.uint16)
    strays = rng.integers(0, 65536, shape, dtype=np.uint16)
    yield "strays", np.where(some(0.004), strays, normal)
    lost = np.where(some(0.01), strays, np.where(some(0.05), 0, normal))
    yield "strays among zeros", lost
    yield "full of escapes", np.where(some(0.3), strays, normal)
    yield "a row in three random", np.where(np.arange(shape[-2])[:, None] % 3 == 0, strays, normal)
    yield "random bits", strays
    every = np.resize(PATTERNS, size)
    yield "all patterns in order", every.reshape(shape)
    yield "all patterns shuffled", rng.permutation(every).reshape(shape)
    sign = np.where(some(0.5), 0x8000, 0)
    yield "NaN payloads", rng.integers(1, 128, shape) | 0x7F80 | sign
    yield "infinite or largest", np.where(some(0.5), 0x7F80, 0x7F7F) | sign
    yield "denormals and zeros", rng.integers(0, 128, shape) | sign


def raw_slots(weights: U16) -> RawSlots:
    """Convert patterns ``[slots, N, K]`` to an arena."""
    return RawSlots(torch.from_numpy(weights.astype(np.uint16).view(np.int16)).view(torch.bfloat16))


def compressed(weights: U16) -> CompressedPages:
    """Encode patterns ``[pages, N, K]`` as blocks, with 128 bytes of garbage in between."""
    blocks, offsets, at = [], [], 1
    codec = Fixed4(weights.shape[-1])
    for page in weights.astype(np.uint16):
        block = codec.encode(page.reshape(-1).view(np.uint8))
        if not len(block):  # no block is shorter than the page; kernels can read longer ones
            block = reference.encode(page)
        blocks += [np.full(128, 0xA5, np.uint8), block, np.full(-len(block) % 128, 0x5A, np.uint8)]
        offsets.append(at)
        at += 1 + -(-len(block) // 128)
    return CompressedPages(
        torch.from_numpy(np.concatenate(blocks)),
        torch.tensor(offsets, dtype=torch.int32),
        *weights.shape[1:],
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a bfloat16 tensor to comparable bits."""
    return tensor.contiguous().view(torch.int16)
