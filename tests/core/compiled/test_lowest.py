"""Selection of the lowest scores, compared with numpy's stable sort."""

from __future__ import annotations

import numpy as np
import pytest

from fluxmoe.core.compiled.lowest import low_bits, lowest

#: Sizes around the width of a block of rows that are compared at once.
SIZES = (1, 2, 63, 64, 65, 127, 129, 500)
DTYPES = [*"bhiqBHIQfd"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [2, 100])
def test_the_lowest_come_first_and_ties_go_to_the_lowest_page(dtype, spread):
    rng = np.random.default_rng(spread)
    low = 0 if np.dtype(dtype).kind == "u" else -spread
    for size in SIZES:
        for count in {1, min(3, size), size // 2 or 1, size}:
            scores = rng.integers(low, spread, size).astype(dtype)
            pages = np.sort(rng.permutation(2 * size)[:size])
            kept, out = np.empty(count, dtype), np.empty(count, np.int64)
            lowest(scores, pages, count, kept, out)
            wanted = np.lexsort((pages, scores))[:count]
            assert np.array_equal(out, pages[wanted])
            assert np.array_equal(kept, scores[wanted])


def test_extreme_scores_are_numbers_like_others():
    for scores in (
        np.repeat([np.inf, 0.0, -np.inf], 70),
        np.repeat(np.array([2**63 - 1, 0, -(2**63)]), 70),
        np.repeat(np.array([2**64 - 1, 2**63, 0], np.uint64), 70),
    ):
        kept, out = np.empty(150, scores.dtype), np.empty(150, np.int64)
        lowest(scores, np.arange(210), 150, kept, out)
        assert out.tolist() == [*range(140, 210), *range(70, 140), *range(10)]


@pytest.mark.parametrize("size", [64, 50])
def test_what_is_not_a_number_is_looked_at(size):
    scores = np.full(size, 2.0)
    scores[[3, 40]] = np.nan, 1.0
    assert low_bits(scores, 0, size, 1.0) == 1 << 3 | 1 << 40
