"""Validation of the operator limits set on a serving engine against a worker's memory."""

from __future__ import annotations

from fluxmoe import sizes
from fluxmoe.backends.runtime import Runtime
from fluxmoe.config import HandLimits
from fluxmoe.core.arbitration.messages import OperatorLimits
from fluxmoe.errors import ConfigError


def in_frames(runtime: Runtime, limits: HandLimits) -> OperatorLimits:
    """Convert limits on the split to frames.

    Raises:
        ConfigError: ``control`` is off, or a limit is out of range.
    """
    if not runtime.config.control:
        raise ConfigError(
            "limits cannot be set while serving", where="control", fix="set control: true"
        )
    part, total = runtime.partition, runtime.memory.budget_bytes
    frame = part.frame_bytes
    experts, kv = part.experts.min * frame, part.kv.min * frame
    for name, value, least in (
        ("budget", limits.budget, experts + kv),
        ("experts.min", limits.experts.min, experts),
        ("experts.max", limits.experts.max, experts),
        ("kv.min", limits.kv.min, kv),
        ("kv.max", limits.kv.max, kv),
    ):
        if value is not None and not least <= value <= total:
            raise ConfigError(
                f"a limit of {sizes.exact(value)} is out of range",
                where=name,
                fix=f"use {sizes.at_least(least)} to {sizes.exact(total)}, or auto",
            )
    if (limits.experts.min or experts) + (limits.kv.min or kv) > (limits.budget or total):
        raise ConfigError(
            "the minimums exceed the budget",
            where="experts.min, kv.min",
            fix="lower one of them",
        )

    def frames(value: int | None, *, up: bool = False) -> int | None:
        return None if value is None else (-(-value // frame) if up else value // frame)

    return OperatorLimits(
        frames(limits.budget),
        frames(limits.experts.min, up=True),
        frames(limits.experts.max),
        frames(limits.kv.min, up=True),
        frames(limits.kv.max),
    )
