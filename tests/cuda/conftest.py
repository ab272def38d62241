"""The process inspection of the core's tests, with which some of these tests share code."""

from tests.core.conftest import ground, pytest_generate_tests, strangers

__all__ = ["ground", "pytest_generate_tests", "strangers"]
