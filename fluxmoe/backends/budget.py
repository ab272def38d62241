"""The user's budget: the size that ``auto`` means on this machine, and the initial split."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fluxmoe import machine, sizes
from fluxmoe.checkpoint import weight_bytes
from fluxmoe.config import Resolved, ResolvedMemory, Share
from fluxmoe.core.memory import sizing
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.host import frame_bytes_for
from fluxmoe.core.memory.kv import KVTenant
from fluxmoe.core.memory.worker import WorkerMemory
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.core.types import Budget, Geometry, PageClass
from fluxmoe.errors import BudgetTooSmallError, ConfigError

#: Fraction that ``memory.budget: auto`` takes of the memory that the model's weights leave free.
SHARE = 0.5


@dataclass(frozen=True, slots=True)
class KVNeed:
    """Memory needed by the engine's KV cache, in bytes.

    Attributes:
        min: Minimum with which the engine can serve.
        max: Size that holds all requests that can run at once.
        reason: Explanation of ``min``, shown in errors.
        block: Size of one KV block, summed over all layers; 0 if unknown. The frame size is chosen
            to match this size.
    """

    min: int
    max: int
    reason: str
    block: int = 0


def require_free(budget: int, *, held: int = 0) -> None:
    """Reject a budget in bytes that exceeds the free memory plus the bytes already held.

    Raises:
        ConfigError: The budget exceeds this memory.
    """
    memory = machine.memory()
    available = memory.available + held
    if budget > available:
        given, free = sizes.apart(budget, available)
        raise ConfigError(
            f"a budget of {given} exceeds the {free} of free memory{_limited(memory)}",
            where="memory.budget",
            fix="lower it",
        )


def require_for_weights(config: Resolved, *, experts: int, others: int, workers: int = 1) -> None:
    """Reject a start whose weights and budgets together exceed the free memory.

    This function is called before the weights are loaded. A host store with neither a limit nor a
    codec keeps all experts as they were loaded.

    Args:
        config: The configuration, with the budget of one worker.
        experts, others: Bytes of the experts and of all other weights.
        workers: Number of workers that share the machine.

    Raises:
        ConfigError: The machine does not have enough free memory.
    """
    plain = config.stores[0].plain
    parts = {
        "the budget" if workers == 1 else f"{workers} budgets": config.memory.budget * workers,
        "experts in the host store": experts if plain else 0,
        "other weights": others,
    }
    memory, need = machine.memory(), sum(parts.values())
    if need > memory.available:
        needed, free = sizes.apart(need, memory.available)
        each = ", ".join(f"{sizes.shown(size)} for {name}" for name, size in parts.items() if size)
        raise ConfigError(
            f"{needed} is needed ({each}), but only {free} is free{_limited(memory)}",
            where="memory.budget, stores",
            fix="lower the budget" + (", or use a store of kind: file" if plain else ""),
        )


def _limited(memory: machine.MemoryRoom) -> str:
    return f" within the limit of {memory.limit}" if memory.limit else ""


def automatic(model: str | None, workers: int) -> int:
    """Compute ``memory.budget: auto`` in bytes, in whole MiB.

    The workers share the machine. All weights count as used even before they are loaded, because
    vLLM loads all weights before the stores take over the experts.

    Args:
        model: The model's folder.
        workers: Number of workers on this machine.

    Raises:
        ConfigError: The size of the model's weights is unknown, or the weights leave no memory
            free.
    """
    if model is None:
        raise ConfigError(
            "auto needs the model's path", where="memory.budget", fix="add model: FOLDER"
        )
    weights, free = weight_bytes(model), machine.memory().available
    budget = int((free - weights) * SHARE / workers) >> 20 << 20
    if budget <= 0:
        raise ConfigError(
            f"the weights of {model} need {sizes.shown(weights)}, and leave none of the "
            f"{sizes.shown(free)} of free memory",
            where="memory.budget",
            fix="free some memory or choose a smaller model",
        )
    return budget


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
    reserved: Sequence[int]
    slots: Sequence[int]

    @property
    def banks(self) -> int:
        return len(self.slots)

    def slots_for(self, frames: int) -> list[int] | None:
        """Compute each bank's slots in ``frames`` frames; None if the frames do not suffice."""
        return sizing.sizes(
            self.geometry,
            self.page_class,
            frames,
            self.frame_bytes,
            banks=self.banks,
            limit=self.bank_limit,
        )


def partition(
    memory: ResolvedMemory,
    geometry: Geometry,
    page_class: PageClass,
    kv: KVNeed,
    *,
    dynamic: bool = False,
    bank_limit: int | None = None,
    ceiling: int = 0,
) -> Partition:
    """Divide the configured budget between the experts and the KV cache.

    Args:
        memory: Configured sizes.
        geometry, page_class: Numbers of layers and experts, and the layout of a page.
        kv: Memory needed by the KV cache.
        dynamic: True if the split may change while the engine serves.
        bank_limit: Maximum number of slots that one kernel call can address; None if unlimited.
        ceiling: Size in bytes to which the budget may be raised later; 0 if it is never raised.

    Raises:
        BudgetTooSmallError: The two minimums together exceed the budget.
        ConfigError: A configured size is below a minimum, or above the budget or the free memory.
        UnsupportedError: The kernel cannot address one layer's experts.
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
    experts, cache = _split(memory, geometry, page_class, frames, frame, kv)
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
    )
    slots = sizing.sizes(
        geometry, page_class, experts.target, frame, banks=len(reserved), limit=bank_limit
    )
    assert slots is not None  # ``fewest_banks`` makes no more banks than the target fills
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
        reserved,
        slots,
    )


def resize(memory: WorkerMemory, pager: ExpertPager, part: Partition, budget: int) -> None:
    """Raise or lower the budget to ``budget`` bytes; only the experts gain or lose memory.

    This function is called between steps. The number of banks does not change. A smaller budget
    drops the pages in the last slots.

    Raises:
        BudgetTooSmallError: A bank cannot hold one layer's experts.
        ConfigError: The difference exceeds the free memory.
        OutOfFramesError: ``budget`` is above the ceiling.
        SubstrateError: A system call failed. As after every error, nothing has changed.
    """
    pool = memory.pool
    frames = budget // part.frame_bytes
    slots = part.slots_for(frames - memory.frames()[KVTenant.NAME])
    if slots is None:
        raise BudgetTooSmallError(
            f"{sizes.shown(budget)} cannot hold one layer of {part.geometry.experts_per_layer} "
            f"experts, {sizes.shown(part.page_class.nbytes)} each, in each of {part.banks} banks",
            fix="set a larger budget or fewer banks",
        )
    require_free(budget, held=pool.nbytes)
    before = pool.limit
    pool.set_limit(max(frames, before))
    try:
        pager.resize_all(slots)
    except BaseException:
        pool.set_limit(before)
        raise
    pool.set_limit(frames)


def _split(
    memory: ResolvedMemory,
    geometry: Geometry,
    page_class: PageClass,
    frames: int,
    frame_bytes: int,
    kv: KVNeed,
) -> tuple[Budget, Budget]:
    """Compute the initial split of ``frames`` frames between the experts and the KV cache.

    Raises:
        BudgetTooSmallError: The two minimums together exceed the budget.
        ConfigError: A configured size is below a minimum or above the budget.
    """
    experts, pages = geometry.experts_per_layer, geometry.num_pages
    least = frames_for(page_class, experts, frame_bytes)
    most = frames_for(page_class, pages, frame_bytes)
    return sizing.first_split(
        frames,
        frame_bytes,
        _wish(
            memory.experts,
            sizing.Wish(
                least,
                most,
                reason=f"one layer of {experts} experts, {sizes.shown(page_class.nbytes)} each",
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
