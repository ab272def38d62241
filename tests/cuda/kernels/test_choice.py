"""Choice of the variant: a table of cases on both sides of each condition."""

from __future__ import annotations

import pytest

from fluxmoe.cuda.kernels.choice import IN_PLACE_UP_TO, Variant, choose


@pytest.mark.parametrize(
    ("tokens", "experts", "free", "want"),
    [
        (1, 8, 0, Variant.IN_PLACE),
        (1, 8, 100, Variant.IN_PLACE),
        (IN_PLACE_UP_TO, 4, 100, Variant.IN_PLACE),
        (2 * IN_PLACE_UP_TO, 4, 4, Variant.IN_PLACE),  # exactly the limit per expert
        (2 * IN_PLACE_UP_TO + 1, 4, 4, Variant.TO_SLOT),
        (2 * IN_PLACE_UP_TO + 1, 4, 3, Variant.IN_PLACE),  # too few slots for the experts
        (4096, 128, 128, Variant.IN_PLACE),
        (4097, 128, 128, Variant.TO_SLOT),
        (0, 0, 0, Variant.IN_PLACE),
    ],
)
def test_variants(tokens: int, experts: int, free: int, want: Variant) -> None:
    assert choose(tokens, 2, experts, raw_resident=False, free_slots=free) is want
    assert choose(tokens, 2, experts, raw_resident=True, free_slots=free) is Variant.RAW
