"""Conversion of frames to slots: the initial split of the budget, and banks.

The experts and the KV cache first get their minimums, then their targets. The rest goes to the KV
cache until the cache has room for all requests that can run at once, because a waiting request
costs more than a streamed page, and then to the experts until all are resident. The remainder is
room for cached prefixes.

A bank is the set of slots that one kernel call can address. A single bank is best, because any
layer can then use any slot. More banks are needed if a kernel's slot index is too narrow
(docs/project/adr/0001). Consecutive layers share a bank.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxmoe.core.memory.experts import frames_for, slots_within
from fluxmoe.core.types import Budget, Geometry, PageClass
from fluxmoe.errors import BudgetTooSmallError, ConfigError, InvariantError, UnsupportedError
from fluxmoe.sizes import apart, at_least, shown


@dataclass(frozen=True, slots=True)
class Wish:
    """A tenant's demand, in frames.

    Attributes:
        min: Minimum with which the tenant can work.
        max: Maximum that the tenant needs; it gets more only if there are leftovers.
        target: Number of frames that the user requested; None if left open.
        reason: Explanation of ``min``, for errors about a budget that is too small.
        cap: Maximum that the user set; None if unlimited.
    """

    min: int
    max: int
    target: int | None = None
    reason: str = ""
    cap: int | None = None


def first_split(budget: int, frame_bytes: int, experts: Wish, kv: Wish) -> tuple[Budget, Budget]:
    """Split the whole frames in ``budget`` bytes between the experts and the KV cache.

    Returns:
        The budgets of the experts and the KV cache in frames. The sum of their targets does not
        exceed the budget.

    Raises:
        BudgetTooSmallError: The two minimums together exceed the budget.
        ConfigError: A target is below its tenant's minimum, or the targets exceed the budget.
    """
    frames = budget // frame_bytes
    if experts.min + kv.min > frames:
        need = (experts.min + kv.min) * frame_bytes
        given, needed = apart(budget, need)
        raise BudgetTooSmallError(
            f"a budget of {given} is too small: at least {needed} is needed, "
            f"{shown(experts.min * frame_bytes)} for experts ({experts.reason}) and "
            f"{shown(kv.min * frame_bytes)} for the KV cache ({kv.reason})",
            where="memory.budget",
            fix=f"set memory.budget to at least {at_least(need)}, or lower max-model-len",
        )
    for name, wish in (("experts", experts), ("kv", kv)):
        if wish.target is not None and wish.target < wish.min:
            target, least = apart(wish.target * frame_bytes, wish.min * frame_bytes)
            raise ConfigError(
                f"{target} is below the minimum of {least} ({wish.reason})",
                where=f"memory.{name}.target",
                fix="raise it or set it to auto",
            )
    fixed = (experts.target or experts.min) + (kv.target or kv.min)
    if fixed > frames:
        needed, given = apart(fixed * frame_bytes, budget)
        raise ConfigError(
            f"the targets need {needed}, but the budget has {given}",
            where="memory",
            fix="lower memory.experts.target or memory.kv.target, or set one of them to auto",
        )
    if experts.target is not None:
        to_experts = min(experts.target, experts.max)
        to_kv = frames - to_experts if kv.target is None else kv.target
    elif kv.target is not None:
        to_kv = kv.target
        to_experts = min(frames - to_kv, experts.max)
    else:
        to_kv = min(kv.max, frames - experts.min)
        to_experts = min(frames - to_kv, experts.max)
        to_kv = frames - to_experts
    to_kv = min(to_kv, frames if kv.cap is None else kv.cap)
    return (
        Budget(experts.min, to_experts, experts.max),
        Budget(kv.min, to_kv, max(to_kv, kv.max)),
    )


def spread(geometry: Geometry, slots: int, banks: int) -> tuple[list[int], list[int]]:
    """Distribute layers and slots over banks; a bank's slots are in proportion to its layers.

    Args:
        geometry: Layers and experts.
        slots: Total number of slots.
        banks: Number of banks, at most one per layer.

    Returns:
        The slots of each bank, at most as many as the bank has pages, and the bank of each layer.
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


def slots_per_bank(
    geometry: Geometry,
    page_class: PageClass,
    frames: int,
    frame_bytes: int,
    *,
    banks: int = 1,
    limit: int | None = None,
    minimum: int | None = None,
) -> list[int] | None:
    """Find the maximum number of slots for each bank within ``frames`` frames in total.

    Args:
        geometry: Layers and experts.
        page_class: Layout of a page.
        frames: Number of frames for all banks together.
        frame_bytes: Size in bytes of a frame.
        banks: Number of banks.
        limit: Maximum number of slots per bank; None if unlimited.
        minimum: Minimum number of slots per bank; by default one layer's experts.

    Returns:
        The number of slots of each bank; None if a bank would have fewer slots than ``minimum``.
    """
    least = geometry.experts_per_layer if minimum is None else minimum
    total = min(slots_within(page_class, frames, frame_bytes), geometry.num_pages)
    # Each bank fills whole frames, so several banks may need a few more frames than one bank.
    for slots in range(total, banks * least - 1, -1):
        shares = [min(share, limit or share) for share in spread(geometry, slots, banks)[0]]
        used = sum(frames_for(page_class, share, frame_bytes) for share in shares)
        if min(shares) >= least and used <= frames:
            return shares
    return None


def fewest_banks(
    geometry: Geometry,
    page_class: PageClass,
    frames: int,
    frame_bytes: int,
    limit: int | None,
    wanted: int,
    *,
    least: int,
    minimum: int | None = None,
) -> tuple[list[int], list[int]]:
    """Find the maximum number of slots per bank within ``frames`` frames, and each layer's bank.

    The number of banks is the smallest that wastes no slot, or ``wanted`` if that is more. Each
    bank must have ``minimum`` slots (by default, one layer's experts) even within ``least`` frames;
    if that is impossible, there are fewer banks.
    """
    layers, experts = geometry.num_layers, geometry.experts_per_layer
    minimum = experts if minimum is None else minimum
    if limit is not None and limit < minimum:
        raise UnsupportedError(
            f"the kernel can address {limit} slots of this size, but a layer has {experts} experts"
        )
    total = min(slots_within(page_class, frames, frame_bytes), geometry.num_pages)
    needed = 1
    while limit is not None and max(spread(geometry, total, needed)[0]) > limit:
        needed += 1
    for banks in range(min(max(needed, wanted), layers), 0, -1):
        small, slots = (
            slots_per_bank(
                geometry, page_class, count, frame_bytes, banks=banks, limit=limit, minimum=minimum
            )
            for count in (least, frames)
        )
        if small is not None and slots is not None:
            return slots, spread(geometry, total, banks)[1]
    raise InvariantError("the experts' minimum does not hold one bank's minimum")
