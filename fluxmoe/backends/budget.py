"""A budget as the user wrote it: what ``auto`` is on this machine, and how it is split at first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil

from fluxmoe.checkpoint import weight_bytes
from fluxmoe.config import Config, Memory, Share
from fluxmoe.core.memory import sizing
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.types import Budget, Geometry, PageClass
from fluxmoe.errors import ConfigError

#: ``memory.budget: auto`` is this part of the memory that is free beside the model's weights.
SHARE = 0.5


@dataclass(frozen=True, slots=True)
class KVNeed:
    """What the engine's KV cache needs, in bytes.

    Attributes:
        min: It cannot serve with less, for the ``reason`` that is shown where that does not fit.
        max: All that can ever run at once.
        block: One KV block, all layers; 0 if unknown. Frames are chosen to suit it.
    """

    min: int
    max: int
    reason: str
    block: int = 0


def require_free(budget: int, *, held: int = 0) -> None:
    """Refuse a budget, in bytes, beyond the memory that is free, or that it holds already.

    Raises:
        ConfigError: Names both.
    """
    available = psutil.virtual_memory().available + held
    if budget > available:
        raise ConfigError(
            f"a budget of {budget} bytes is more than the {available} bytes that are free",
            where="memory.budget",
            fix="lower it",
        )


def resolved(config: Config, *, model: str | None, workers: int) -> Config:
    """The configuration with a budget in bytes, whole MiB, where it was ``auto``.

    Workers share the machine. Weights that are not loaded yet are counted as used, all of them:
    vLLM loads them before the stores take the experts over.

    Args:
        config: As the user wrote it.
        model: The model's folder.
        workers: How many there are on this machine.

    Raises:
        ConfigError: The size of the model's weights is not known, or nothing is left beside them.
    """
    if config.memory.budget is not None:
        return config
    if model is None:
        raise ConfigError(
            "auto needs to know the model", where="memory.budget", fix="add model: FOLDER"
        )
    weights, free = weight_bytes(model), psutil.virtual_memory().available
    budget = int((free - weights) * SHARE / workers) >> 20 << 20
    if budget <= 0:
        raise ConfigError(
            f"{free} bytes are free, the weights of {model} need {weights}: nothing is left",
            where="memory.budget",
            fix="free some memory, or choose a smaller model",
        )
    memory = config.memory.model_copy(update={"budget": budget})
    return config.model_copy(update={"memory": memory})


def split(
    memory: Memory,
    geometry: Geometry,
    page_class: PageClass,
    frames: int,
    frame_bytes: int,
    kv: KVNeed,
) -> tuple[Budget, Budget]:
    """The first split of ``frames`` frames: experts and KV cache.

    Raises:
        BudgetTooSmallError: The minimums do not fit.
        ConfigError: The configuration asks for less than a minimum, or for more than there is.
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
    """Let each tenant have all that the other can do without, but for what the user forbids."""
    cap = frames if memory.kv.max is None else kv.max
    return (
        replace(experts, max=min(experts.max, frames - kv.min)),
        replace(kv, max=min(cap, frames - experts.min)),
    )


def _wish(share: Share, need: sizing.Wish, frame_bytes: int, name: str) -> sizing.Wish:
    """The need of a tenant, tightened by what the configuration says."""
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
