"""The setup of the core's tests, whose rig some of these tests use."""

from tests.core.conftest import ground, pytest_generate_tests, strangers

__all__ = ["ground", "pytest_generate_tests", "strangers"]
