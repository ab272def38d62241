"""The partition of a worker's budget: banks, and the initial split between experts and KV cache."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fluxmoe import sizes
from fluxmoe.backends.budget import KVNeed, require_free
from fluxmoe.config import ResolvedMemory, Share
from fluxmoe.core.memory import sizing
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.host import frame_bytes_for
from fluxmoe.core.types import Budget, Geometry, PageClass
from fluxmoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Partition:
    """The budget of one worker, with its initial split and its limits, in frames and slots.

    Attributes:
        geometry, page_class: Numbers of layers and experts, and the layout of a page.
        frame_bytes: Bytes of a frame.
        frames, most: Number of frames in the budget, and the largest number to which the budget may
            be raised.
        experts, kv: Minimum, initial and maximum number of frames of each tenant.
        bank_limit: Maximum number of slots that one kernel call can address; None if unlimited.
        bank_of: Bank of each layer.
        minimum: Minimum number of slots in each bank: the experts of one layer or, with waves, of
            one token.
        reserved: Number of slots in each bank for which address space is reserved.
        slots: Initial number of slots in each bank.
    """

    geometry: Geometry
    page_class: PageClass
    frame_bytes: int
    frames: int
    most: int
    experts: Budget
    kv: Budget
    bank_limit: int | None
    bank_of: Sequence[int]
    minimum: int
    reserved: Sequence[int]
    slots: Sequence[int]

    @property
    def banks(self) -> int:
        return len(self.slots)

    @property
    def in_waves(self) -> bool:
        """True if a bank may have fewer slots than a layer has experts."""
        return self.minimum < self.geometry.experts_per_layer

    def slots_for(self, frames: int) -> list[int] | None:
        """Compute each bank's number of slots in ``frames`` frames; None if these are too few."""
        return sizing.slots_per_bank(
            self.geometry,
            self.page_class,
            frames,
            self.frame_bytes,
            banks=self.banks,
            limit=self.bank_limit,
            minimum=self.minimum,
        )


def partition(
    memory: ResolvedMemory,
    geometry: Geometry,
    page_class: PageClass,
    kv: KVNeed,
    *,
    dynamic: bool = False,
    bank_limit: int | None = None,
    top_k: int | None = None,
    ceiling: int = 0,
) -> Partition:
    """Divide the configured budget between the experts and the KV cache.

    Args:
        memory: Configured sizes.
        geometry, page_class: Numbers of layers and experts, and the layout of a page.
        kv: Memory needed by the KV cache.
        dynamic: True if the split may change while the engine serves.
        bank_limit: Maximum number of slots that one kernel call can address; None if unlimited.
        top_k: Number of experts per token if layers can run in waves; None if they cannot. Waves
            are used only if the memory, a configured size or ``bank_limit`` is too small for one
            layer's experts.
        ceiling: Size in bytes to which the budget may be raised later; 0 if it is never raised.

    Raises:
        BudgetTooSmallError: The two minimums together exceed the budget.
        ConfigError: A configured size is below a minimum, or above the budget or the free memory.
        UnsupportedError: The kernel cannot address the minimum number of slots of a bank.
    """
    require_free(memory.budget)
    frame = int(memory.frame or frame_bytes_for(memory.budget, kv.block if dynamic else 0))
    if frame % mmap.PAGESIZE:
        raise ConfigError(
            f"{sizes.exact(frame)} is not a multiple of {sizes.exact(mmap.PAGESIZE)}",
            where="memory.frame",
            fix="use a power of two, or auto",
        )
    frames = memory.budget // frame
    minimum = _minimum(memory, geometry, page_class, frames, frame, kv, bank_limit, top_k)
    experts, cache = _split(memory, geometry, page_class, frame, kv, minimum)
    if dynamic:
        experts, cache = _widened(memory, frames, experts, cache)
    reserved, bank_of = sizing.fewest_banks(
        geometry,
        page_class,
        experts.max if dynamic else experts.target,
        frame,
        bank_limit,
        memory.banks,
        least=experts.target,
        minimum=minimum,
    )
    slots = sizing.slots_per_bank(
        geometry,
        page_class,
        experts.target,
        frame,
        banks=len(reserved),
        limit=bank_limit,
        minimum=minimum,
    )
    assert slots is not None  # ``fewest_banks`` makes only banks that the target can fill
    if ceiling > memory.budget:
        pages, _ = sizing.spread(geometry, geometry.num_pages, len(reserved))
        reserved = [min(count, bank_limit or count) for count in pages]
    return Partition(
        geometry,
        page_class,
        frame,
        frames,
        max(frames, ceiling // frame),
        experts,
        cache,
        bank_limit,
        bank_of,
        minimum,
        reserved,
        slots,
    )


def _minimum(
    memory: ResolvedMemory,
    geometry: Geometry,
    page_class: PageClass,
    frames: int,
    frame_bytes: int,
    kv: KVNeed,
    bank_limit: int | None,
    top_k: int | None,
) -> int:
    """Return the minimum number of slots of a bank, which is ``top_k`` only if necessary."""
    experts, share = geometry.experts_per_layer, memory.experts
    if top_k is None:
        return experts
    given = [size for size in (share.min, share.target, share.max) if size is not None]
    room = min([frames - -(-kv.min // frame_bytes), *(int(size) // frame_bytes for size in given)])
    holds = frames_for(page_class, experts, frame_bytes) <= room
    return experts if holds and (bank_limit is None or bank_limit >= experts) else top_k


def least_experts(geometry: Geometry, minimum: int) -> str:
    """Describe the experts for which a bank must have slots."""
    whole = minimum == geometry.experts_per_layer
    return f"one layer of {minimum} experts" if whole else f"the {minimum} experts of one token"


def _split(
    memory: ResolvedMemory,
    geometry: Geometry,
    page_class: PageClass,
    frame_bytes: int,
    kv: KVNeed,
    minimum: int,
) -> tuple[Budget, Budget]:
    """Compute the initial split of the budget between the experts and the KV cache.

    Raises:
        BudgetTooSmallError: The two minimums together exceed the budget.
        ConfigError: A configured size is below a minimum or above the budget.
    """
    least = frames_for(page_class, minimum, frame_bytes)
    most = frames_for(page_class, geometry.num_pages, frame_bytes)
    return sizing.first_split(
        memory.budget,
        frame_bytes,
        _wish(
            memory.experts,
            sizing.Wish(
                least,
                most,
                reason=f"{least_experts(geometry, minimum)}, {sizes.shown(page_class.nbytes)} each",
            ),
            frame_bytes,
            "experts",
        ),
        _wish(
            memory.kv,
            sizing.Wish(-(-kv.min // frame_bytes), -(-kv.max // frame_bytes), reason=kv.reason),
            frame_bytes,
            "kv",
        ),
    )


def _widened(
    memory: ResolvedMemory, frames: int, experts: Budget, kv: Budget
) -> tuple[Budget, Budget]:
    """Raise each tenant's maximum to what the other's minimum leaves, within the user's limits."""
    cap = frames if memory.kv.max is None else kv.max
    return (
        replace(experts, max=min(experts.max, frames - kv.min)),
        replace(kv, max=min(cap, frames - experts.min)),
    )


def _wish(share: Share, need: sizing.Wish, frame_bytes: int, name: str) -> sizing.Wish:
    """Compute a tenant's demand within the limits in the configuration."""
    least = need.min if share.min is None else -(-int(share.min) // frame_bytes)
    if share.min is not None and least < need.min:
        given, needed = sizes.apart(share.min, need.min * frame_bytes)
        raise ConfigError(
            f"{given} is less than the minimum of {needed} ({need.reason})",
            where=f"memory.{name}.min",
            fix="raise it or set it to auto",
        )
    cap = None if share.max is None else int(share.max) // frame_bytes
    if share.max is not None and cap is not None and cap < least:
        given, needed = sizes.apart(share.max, least * frame_bytes)
        raise ConfigError(
            f"{given} is less than the minimum of {needed} ({need.reason})",
            where=f"memory.{name}.max",
            fix="raise it or set it to auto",
        )
    target = None if share.target is None else int(share.target) // frame_bytes
    most = need.max if cap is None else min(need.max, cap)
    return sizing.Wish(least, most, target, need.reason, cap)
