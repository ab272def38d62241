"""Choice of the fused MoE kernel's variant for a batch: a pure function and its threshold.

Decoding in registers saves bandwidth at the cost of arithmetic, which pays off as long as each
weight is used for few tokens. The threshold is estimated from the instruction counts of the
compiled kernels and has not been confirmed on a GPU yet (docs/concepts/kernels.md). ``python -m
benchmarks gpu kernel`` measures the threshold.
"""

from __future__ import annotations

from enum import StrEnum

#: Average number of tokens per expert up to which decoding in registers should cost no time.
IN_PLACE_UP_TO = 64


class Variant(StrEnum):
    """Ways to read the weights of a layer."""

    RAW = "raw"
    IN_PLACE = "in-place"
    TO_SLOT = "decode-to-slot"


def choose(
    tokens: int, top_k: int, experts: int, *, raw_resident: bool, free_slots: int
) -> Variant:
    """Choose the variant for one execution of one layer.

    Args:
        tokens: Number of tokens in the batch.
        top_k: Number of experts per token.
        experts: Number of distinct experts in the batch or, if unknown, in the layer.
        raw_resident: True if all of these experts are in slots, uncompressed.
        free_slots: Number of slots available for decoding pages of this layer; may be 0.

    Returns:
        ``RAW`` if all experts are uncompressed; ``TO_SLOT`` if the weights are read so often that
        decoding them once is cheaper and there are enough slots; otherwise ``IN_PLACE``.
    """
    if raw_resident:
        return Variant.RAW
    often = tokens * top_k > IN_PLACE_UP_TO * max(experts, 1)
    return Variant.TO_SLOT if often and free_slots >= experts else Variant.IN_PLACE
