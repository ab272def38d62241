"""Fixtures for tests of policies, stores and codecs, available wherever fluxmoe is installed.

pytest imports this module in every run. The module is outside the package, so that only tests that
use the fixtures spend time on importing fluxmoe.
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
    """Each golden trace in turn: ``events``, ``capacities`` and known ``misses``."""
    from fluxmoe.testing import GOLDEN

    return GOLDEN[request.param]


@pytest.fixture
def fluxmoe_registry() -> Registry:
    """Registry of only the built-in policies; ``add(module, name)`` adds a plugin."""
    from fluxmoe import policies
    from fluxmoe.plugins import Registry

    registry = Registry()
    registry.add(policies, "fluxmoe")
    return registry


@pytest.fixture
def fluxmoe_fault_plan() -> FaultPlan:
    """Plan that makes a site of a ``FaultyStore`` or ``FaultySubstrate`` fail on its n-th call."""
    from fluxmoe.testing import FaultPlan

    return FaultPlan()


@pytest.fixture
def fluxmoe_no_leaks() -> Iterator[None]:
    """Fail the test if it leaves files, mappings, threads or processes behind."""
    from fluxmoe.testing import no_leaks

    with no_leaks():
        yield
