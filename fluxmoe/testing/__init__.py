"""Test tools for policies and for FluxMoE itself: conformance, golden traces, faults and leaks.

The tools work without pytest; with pytest, FluxMoE adds fixtures (``fluxmoe_golden`` and others).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxmoe.testing.conformance import (
        ConformanceError,
        check_arbitration_policy,
        check_codec,
        check_eviction_policy,
        check_prefetch_policy,
    )
    from fluxmoe.testing.faults import FaultPlan, FaultyStore, FaultySubstrate
    from fluxmoe.testing.golden import GOLDEN, GoldenTrace, events_of
    from fluxmoe.testing.leaks import LeakError, no_leaks

__all__ = [
    "GOLDEN",
    "ConformanceError",
    "FaultPlan",
    "FaultyStore",
    "FaultySubstrate",
    "GoldenTrace",
    "LeakError",
    "check_arbitration_policy",
    "check_codec",
    "check_eviction_policy",
    "check_prefetch_policy",
    "events_of",
    "no_leaks",
]

_HOMES = {
    **dict.fromkeys(("FaultPlan", "FaultyStore", "FaultySubstrate"), "faults"),
    **dict.fromkeys(("GOLDEN", "GoldenTrace", "events_of"), "golden"),
    **dict.fromkeys(("LeakError", "no_leaks"), "leaks"),
}


def __getattr__(name: str) -> Any:
    # Imported on first use, because checkpoints and faults do not need the simulator.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "conformance")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
