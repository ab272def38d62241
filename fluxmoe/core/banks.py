"""Banks: the slots that one kernel call can address, and which layers share them.

One bank is best, because any layer can use any slot. More are needed where a kernel's slot index
is too narrow for all of them (docs/adr/0001). Consecutive layers share a bank.
"""

from __future__ import annotations

from fluxmoe.core.types import Geometry


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
