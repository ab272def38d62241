"""The same process inspection as for the core's tests, which some of these share code with."""

from tests.core.conftest import ground, pytest_generate_tests, strangers

__all__ = ["ground", "pytest_generate_tests", "strangers"]
