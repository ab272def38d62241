"""FluxMoE: a policy-pluggable memory manager for Mixture-of-Experts inference."""

from fluxmoe.core.policy import (
    ArbitrationPolicy,
    ArbitrationView,
    EvictionPolicy,
    PageView,
    PrefetchPolicy,
    Split,
)
from fluxmoe.core.types import Access, Counters, Phase
from fluxmoe.errors import FluxMoEError
from fluxmoe.hookspecs import hookimpl, hookspec

__version__ = "0.1.0"

__all__ = [
    "Access",
    "ArbitrationPolicy",
    "ArbitrationView",
    "Counters",
    "EvictionPolicy",
    "FluxMoEError",
    "PageView",
    "Phase",
    "PrefetchPolicy",
    "Split",
    "hookimpl",
    "hookspec",
]
