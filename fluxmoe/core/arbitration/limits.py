"""Limits that an operator sets on a running server, and their effect on the tenants' bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType

from fluxmoe.core.arbitration.messages import OperatorLimits
from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.kv import KVTenant
from fluxmoe.core.policy.arbitration import ArbitrationView
from fluxmoe.core.types import Budget

EXPERTS, KV = ExpertTenant.NAME, KVTenant.NAME


def narrowed(
    bounds: Mapping[str, Budget], limits: OperatorLimits, *, total: int, group: int
) -> MappingProxyType[str, Budget]:
    """Narrow the tenants' bounds to the operator's limits.

    Limits that cannot be met (below a tenant's minimum or above its maximum) are clipped.

    Args:
        bounds: Tenant → minimum and maximum without limits.
        limits: The operator's limits.
        total: Frames of the whole budget.
        group: Frames per KV group.
    """
    least = None if limits.kv_min is None else -(-limits.kv_min // group) * group
    kv = _within(bounds[KV], least, limits.kv_max)
    experts = _within(bounds[EXPERTS], limits.experts_min, limits.experts_max)
    if experts.min + kv.min > total:  # the two cannot both be met: the KV cache has precedence
        experts = replace(experts, min=total - kv.min)
    return MappingProxyType({EXPERTS: experts, KV: kv})


def _within(bounds: Budget, least: int | None, most: int | None) -> Budget:
    """Narrow bounds to ``most`` and then ``least``, clipping values that cannot be attained."""
    upper = bounds.max if most is None else min(max(most, bounds.min), bounds.max)
    lower = bounds.min if least is None else min(max(least, bounds.min), upper)
    return Budget(lower, bounds.target, upper)


def filled(wishes: dict[str, int], view: ArbitrationView) -> dict[str, int]:
    """Distribute unclaimed frames: up to each tenant's target, then up to its maximum."""
    for goal in ("target", "max"):
        for name in (EXPERTS, KV):
            bounds = view.bounds[name]
            rest = view.total_frames - sum(wishes.values())
            room = min(getattr(bounds, goal), bounds.max) - wishes[name]
            wishes[name] += max(min(rest, room), 0)
    return wishes


def in_words(limits: OperatorLimits) -> str:
    """Describe the limits that are set."""
    given = [(field.name, getattr(limits, field.name)) for field in fields(limits)]
    return ", ".join(f"{name} {value} frames" for name, value in given if value is not None)
