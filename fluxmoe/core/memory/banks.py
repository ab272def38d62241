"""Banks: the slots that one kernel call can address, and which layers share them.

One bank is best, because any layer can use any slot. More are needed where a kernel's slot index
is too narrow for all of them (docs/adr/0001). Consecutive layers share a bank.
"""

from __future__ import annotations

from fluxmoe.core.memory.experts import frames_for, slots_within
from fluxmoe.core.types import Geometry, PageClass


def spread(geometry: Geometry, slots: int, banks: int) -> tuple[list[int], list[int]]:
    """Spread layers and slots over banks, slots in proportion to layers.

    Args:
        geometry: Layers and experts.
        slots: Slots over all banks.
        banks: Number of banks, at most one per layer.

    Returns:
        Slots per bank, never more than the bank has pages, and the bank of each layer.
    """
    layers = geometry.num_layers
    bank_of = [layer * banks // layers for layer in range(layers)]
    ends = [bank_of.index(bank) for bank in range(banks)] + [layers]
    shares = [
        min(
            slots * ends[bank + 1] // layers - slots * ends[bank] // layers,
            (ends[bank + 1] - ends[bank]) * geometry.experts_per_layer,
        )
        for bank in range(banks)
    ]
    return shares, bank_of


def sizes(
    geometry: Geometry,
    page_class: PageClass,
    frames: int,
    frame_bytes: int,
    *,
    banks: int = 1,
    limit: int | None = None,
) -> list[int] | None:
    """The most slots per bank that commit at most ``frames`` frames.

    Args:
        geometry: Layers and experts.
        page_class: Layout of a page.
        frames: Frames for all banks together.
        frame_bytes: Bytes of a frame.
        banks: Number of banks.
        limit: Most slots a bank may have; None if there is no limit.

    Returns:
        Slots per bank; None if a bank could not hold one layer's experts.
    """
    experts = geometry.experts_per_layer
    total = min(slots_within(page_class, frames, frame_bytes), geometry.num_pages)
    # Each bank fills whole frames of its own, so several may need a few more than one does.
    for slots in range(total, banks * experts - 1, -1):
        shares = [min(share, limit or share) for share in spread(geometry, slots, banks)[0]]
        used = sum(frames_for(page_class, share, frame_bytes) for share in shares)
        if min(shares) >= experts and used <= frames:
            return shares
    return None
