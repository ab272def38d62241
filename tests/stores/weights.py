"""Named arrays of bf16 weights that are difficult to encode."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U16 = npt.NDArray[np.uint16]


def bf16(numbers: npt.NDArray[np.floating]) -> U16:
    """Truncate float32 numbers to their upper halves."""
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def matrices(rows: int = 70, cols: int = 192) -> dict[str, U16]:
    """Make all arrays as ``[rows, cols]``."""
    rng = np.random.default_rng(0)
    shape = (rows, cols)
    normal = bf16(rng.standard_normal(shape) * 0.02)
    found = {"normal": normal, "heavy tails": bf16(rng.standard_t(2, shape))}

    pruned = normal.copy()
    pruned[rng.random(shape) < 0.05] = 0
    pruned[rng.random(shape) < 0.01] = 0x8000
    found["pruned"] = pruned

    found["a column of infinities"] = normal.copy()
    found["a column of infinities"][:, 5] = 0x7F80

    scattered = normal.copy()
    hit = rng.random(shape) < 0.01
    scattered[hit] = rng.integers(0, 65536, hit.sum())
    found["scattered patterns"] = scattered

    full = normal.copy()  # every seventh row has no common exponent range
    full[::7] = rng.integers(0, 65536, full[::7].shape)
    found["rows full of escapes"] = full

    everything = rng.permutation(
        np.tile(np.arange(65536, dtype=np.uint16), rows * cols // 65536 + 1)
    )
    found["patterns"] = everything[: rows * cols].reshape(shape)
    sign = rng.integers(0, 2, shape).astype(np.uint16) << 15
    found["NaN payloads"] = (0x7F80 | rng.integers(1, 128, shape)).astype(np.uint16) | sign
    found["denormals"] = rng.integers(0, 128, shape).astype(np.uint16) | sign
    found["largest and infinite"] = np.where(sign > 0, 0x7F7F, 0xFF80).astype(np.uint16)
    found["zero"] = np.zeros(shape, np.uint16)
    found["minus zero"] = np.full(shape, 0x8000, np.uint16)
    found["constant"] = np.full(shape, 0x3FC0, np.uint16)
    found["nearly zero"] = np.zeros(shape, np.uint16)
    found["nearly zero"][::3, ::50] = 0x3F80
    return found
