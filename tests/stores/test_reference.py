"""The reference code itself: whatever is put in comes out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stores import reference


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = (rng.standard_normal((70, 192)) * 0.02).astype(np.float32)
    bf16 = (normal.view(np.uint32) >> 16).astype(np.uint16)
    pruned = bf16.copy()
    pruned[rng.random(bf16.shape) < 0.05] = 0
    pruned[rng.random(bf16.shape) < 0.01] = 0x8000
    outlier = bf16.copy()
    outlier[:, 5] = 0x7F80
    return {
        "normal": bf16,
        "pruned": pruned,
        "outliers": outlier,
        "zero": np.zeros((64, 128), np.uint16),
        "patterns": np.arange(65536, dtype=np.uint16).reshape(512, 128),
        "shuffled": rng.permutation(np.arange(65536, dtype=np.uint16)).reshape(512, 128),
        "none": np.zeros((0, 128), np.uint16),
    }


@pytest.mark.parametrize("name", matrices())
def test_what_goes_in_comes_out(name: str) -> None:
    weights = matrices()[name]
    got, tail = reference.decode(reference.encode(weights, b"odd"))
    assert (got == weights).all() and tail == b"odd"


def test_zeros_and_outliers_make_no_raw_segments() -> None:
    for name in ("pruned", "outliers"):
        trailer = reference.encode(matrices()[name])[-64:].view(reference.TRAILER)[0]
        assert trailer["raw"] == 0
