"""The user's budget in bytes and frames: ``auto`` resolved on this machine, the first split."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil

from fluxmoe.checkpoint import weight_bytes
from fluxmoe.config import Memory, Share
from fluxmoe.core.memory import sizing
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.types import Budget, Geometry, PageClass
from fluxmoe.errors import ConfigError

#: Fraction of the free memory after the model's weights that ``memory.budget: auto`` takes.
SHARE = 0.5


@dataclass(frozen=True, slots=True)
class KVNeed:
    """Memory needed by the engine's KV cache, in bytes.

    Attributes:
        min: Least with which the engine can serve.
        max: Enough for all requests that can ever run at once.
        reason: Explanation of ``min``, shown in errors.
        block: One KV block of all layers, 0 if unknown. Frames are sized to suit it.
    """

    min: int
    max: int
    reason: str
    block: int = 0


def require_free(budget: int, *, held: int = 0) -> None:
    """Refuse a budget in bytes that exceeds the free memory plus the bytes already held.

    Raises:
        ConfigError: Names both.
    """
    available = psutil.virtual_memory().available + held
    if budget > available:
        raise ConfigError(
            f"a budget of {budget} bytes exceeds the {available} bytes of free memory",
            where="memory.budget",
            fix="lower it",
        )


def automatic(model: str | None, workers: int) -> int:
    """The bytes of ``memory.budget: auto``, in whole MiB.

    Workers share the machine. All weights not loaded yet are counted as used, because
    vLLM loads them before the stores take over the experts.

    Args:
        model: The model's folder.
        workers: Number of workers on this machine.

    Raises:
        ConfigError: The size of the model's weights is unknown, or they leave no memory.
    """
    if model is None:
        raise ConfigError(
            "auto needs the model's path", where="memory.budget", fix="add model: FOLDER"
        )
    weights, free = weight_bytes(model), psutil.virtual_memory().available
    budget = int((free - weights) * SHARE / workers) >> 20 << 20
    if budget <= 0:
        raise ConfigError(
            f"the weights of {model} need {weights} bytes and leave none of the {free} bytes free",
            where="memory.budget",
            fix="free some memory, or choose a smaller model",
        )
    return budget


def split(
    memory: Memory,
    geometry: Geometry,
    page_class: PageClass,
    frames: int,
    frame_bytes: int,
    kv: KVNeed,
) -> tuple[Budget, Budget]:
    """The initial split of ``frames`` frames between experts and KV cache.

    Raises:
        BudgetTooSmallError: The minimums do not fit.
        ConfigError: A configured size is below a minimum or beyond the budget.
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
                reason=f"one layer of {experts} experts, {page_class.nbytes} bytes each",
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


def widened(memory: Memory, frames: int, experts: Budget, kv: Budget) -> tuple[Budget, Budget]:
    """Raise each tenant's maximum to what the other's minimum leaves, within the user's limits."""
    cap = frames if memory.kv.max is None else kv.max
    return (
        replace(experts, max=min(experts.max, frames - kv.min)),
        replace(kv, max=min(cap, frames - experts.min)),
    )


def _wish(share: Share, need: sizing.Wish, frame_bytes: int, name: str) -> sizing.Wish:
    """The need of a tenant, narrowed by the configuration."""
    least = need.min if share.min is None else -(-int(share.min) // frame_bytes)
    if least < need.min:
        raise ConfigError(
            f"{share.min} bytes are less than the minimum of {need.min * frame_bytes} "
            f"({need.reason})",
            where=f"memory.{name}.min",
            fix="raise it, or set it to auto",
        )
    cap = None if share.max is None else int(share.max) // frame_bytes
    if cap is not None and cap < least:
        raise ConfigError(
            f"{share.max} bytes are less than the minimum of {least * frame_bytes} ({need.reason})",
            where=f"memory.{name}.max",
            fix="raise it, or set it to auto",
        )
    target = None if share.target is None else int(share.target) // frame_bytes
    most = need.max if cap is None else min(need.max, cap)
    return sizing.Wish(least, most, target, need.reason, cap)
