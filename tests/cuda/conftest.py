"""The same look at the process as for the core's tests: some of these were written with them."""

from tests.core.conftest import ground, pytest_generate_tests, strangers

__all__ = ["ground", "pytest_generate_tests", "strangers"]
