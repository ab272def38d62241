"""Fixtures for tests of policies, stores and codecs, wherever fluxmoe is installed.

pytest imports this module in every run. It lies outside the package so that importing it imports
nothing else: who uses no fixture does not wait for fluxmoe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fluxmoe.plugins import Registry
    from fluxmoe.testing import FaultPlan, GoldenTrace

GOLDEN_NAMES = ("sparse", "mixed", "scan", "predicted", "flat", "thin")


@pytest.fixture(params=GOLDEN_NAMES)
def fluxmoe_golden(request: pytest.FixtureRequest) -> GoldenTrace:
    """One golden trace after the other: ``events``, ``capacities`` and known ``misses``."""
    from fluxmoe.testing import GOLDEN

    return GOLDEN[request.param]


@pytest.fixture
def fluxmoe_registry() -> Registry:
    """The built-in policies and nothing that is installed; ``add(module, name)`` adds a plugin."""
    from fluxmoe import policies
    from fluxmoe.plugins import Registry

    registry = Registry()
    registry.add(policies, "fluxmoe")
    return registry


@pytest.fixture
def fluxmoe_fault_plan() -> FaultPlan:
    """Lets one site of a ``FaultyStore`` or ``FaultySubstrate`` fail at its n-th passage."""
    from fluxmoe.testing import FaultPlan

    return FaultPlan()


@pytest.fixture
def fluxmoe_no_leaks() -> Iterator[None]:
    """The test fails if it leaves files, mappings, threads or processes behind."""
    from fluxmoe.testing import no_leaks

    with no_leaks():
        yield
