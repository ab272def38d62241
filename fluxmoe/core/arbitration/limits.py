"""Limits that a person sets while the engine serves: what they leave each tenant, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType

from fluxmoe.core.arbitration.messages import ByHand
from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.kv import KVTenant
from fluxmoe.core.policy.arbitration import ArbitrationView
from fluxmoe.core.types import Budget

EXPERTS, KV = ExpertTenant.NAME, KVTenant.NAME


def narrowed(
    bounds: Mapping[str, Budget], limits: ByHand, *, total: int, group: int
) -> MappingProxyType[str, Budget]:
    """The bounds of the tenants as far as the limits leave them.

    What cannot be kept to (less than a tenant's minimum, more than there is) is cut.

    Args:
        bounds: Tenant → what it must and may have without them.
        limits: By hand.
        total: Frames of the whole budget.
        group: Frames of a KV group.
    """
    least = None if limits.kv_min is None else -(-limits.kv_min // group) * group
    kv = _within(bounds[KV], least, limits.kv_max)
    experts = _within(bounds[EXPERTS], limits.experts_min, limits.experts_max)
    if experts.min + kv.min > total:  # both cannot be had: the KV cache wins
        experts = replace(experts, min=total - kv.min)
    return MappingProxyType({EXPERTS: experts, KV: kv})


def _within(bounds: Budget, least: int | None, most: int | None) -> Budget:
    """Bounds narrowed by hand, the maximum first: what cannot be had is cut."""
    upper = bounds.max if most is None else min(max(most, bounds.min), bounds.max)
    lower = bounds.min if least is None else min(max(least, bounds.min), upper)
    return Budget(lower, bounds.target, upper)


def filled(wishes: dict[str, int], view: ArbitrationView) -> dict[str, int]:
    """Share out what nobody wants: up to what each began with, then up to what each may have."""
    for goal in ("target", "max"):
        for name in (EXPERTS, KV):
            bounds = view.bounds[name]
            rest = view.total_frames - sum(wishes.values())
            room = min(getattr(bounds, goal), bounds.max) - wishes[name]
            wishes[name] += max(min(rest, room), 0)
    return wishes


def in_words(limits: ByHand) -> str:
    """Those that are set."""
    given = [(field.name, getattr(limits, field.name)) for field in fields(limits)]
    return ", ".join(f"{name} {value} frames" for name, value in given if value is not None)
