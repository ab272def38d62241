"""Which variant of the fused MoE kernel to run for a batch. A pure function; thresholds live here.

Decoding in registers trades arithmetic for bandwidth: it pays while a weight is read for few
tokens. The thresholds are what instruction counts of the compiled kernels let one expect; no card
has confirmed them yet (docs/kernels.md). ``python -m benchmarks gpu kernel`` measures them.
"""

from __future__ import annotations

from enum import StrEnum

#: Up to this many tokens per expert of a layer on average, decoding in registers should be free.
IN_PLACE_UP_TO = 64


class Variant(StrEnum):
    """How the weights of a layer are read."""

    RAW = "raw"
    IN_PLACE = "in-place"
    TO_SLOT = "decode-to-slot"


def choose(
    tokens: int, top_k: int, experts: int, *, raw_resident: bool, free_slots: int
) -> Variant:
    """The variant for one execution of one layer.

    Args:
        tokens: Tokens of the batch.
        top_k: Experts per token.
        experts: Distinct experts that the batch is routed to, or the layer's experts if unknown.
        raw_resident: All of these experts lie uncompressed in slots.
        free_slots: Slots that pages may be decoded into for this layer; may be 0.

    Returns:
        ``RAW`` if nothing is compressed; ``TO_SLOT`` if weights are read so often that decoding
        them once is cheaper, and slots are there for all of them; else ``IN_PLACE``.
    """
    if raw_resident:
        return Variant.RAW
    often = tokens * top_k > IN_PLACE_UP_TO * max(experts, 1)
    return Variant.TO_SLOT if often and free_slots >= experts else Variant.IN_PLACE
