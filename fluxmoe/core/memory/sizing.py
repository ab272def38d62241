"""The first split of the budget: what experts and KV cache start with.

Both tenants get their minimum, then what the user asked for. What is left goes to the KV cache
until it holds all that can ever run at once, because a waiting request costs more than a page that
is streamed; then to the experts until all are resident; the rest is room for cached prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxmoe.core.types import Budget
from fluxmoe.errors import BudgetTooSmallError, ConfigError


@dataclass(frozen=True, slots=True)
class Wish:
    """What a tenant wants, in frames.

    Attributes:
        min: It cannot do with less, for the ``reason`` that is shown when the budget is too small.
        max: More would be of no use, but for what is left over.
        target: What the user asked for; None where that was left open.
        cap: More than that the user forbids.
    """

    min: int
    max: int
    target: int | None = None
    reason: str = ""
    cap: int | None = None


def first_split(frames: int, frame_bytes: int, experts: Wish, kv: Wish) -> tuple[Budget, Budget]:
    """Split ``frames`` frames between experts and KV cache.

    Returns:
        The budgets of experts and KV cache; their targets add up to at most ``frames``.

    Raises:
        BudgetTooSmallError: The minimums do not fit.
        ConfigError: A target is below its minimum, or both together exceed the budget.
    """
    if experts.min + kv.min > frames:
        need = (experts.min + kv.min) * frame_bytes
        raise BudgetTooSmallError(
            f"a budget of {frames * frame_bytes} bytes is too small: at least {need} are needed, "
            f"{experts.min * frame_bytes} for experts ({experts.reason}) and "
            f"{kv.min * frame_bytes} for the KV cache ({kv.reason})",
            where="memory.budget",
            fix=f"set memory.budget to at least {need} bytes, or lower max-model-len",
        )
    for name, wish in (("experts", experts), ("kv", kv)):
        if wish.target is not None and wish.target < wish.min:
            raise ConfigError(
                f"{wish.target * frame_bytes} bytes are below the minimum of "
                f"{wish.min * frame_bytes} ({wish.reason})",
                where=f"memory.{name}.target",
                fix="raise it, or set it to auto",
            )
    fixed = (experts.target or experts.min) + (kv.target or kv.min)
    if fixed > frames:
        raise ConfigError(
            f"the targets need {fixed * frame_bytes} bytes, the budget has {frames * frame_bytes}",
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
