"""Setup for the core's tests, which inspect a process that other test files have used before."""

import os
from collections.abc import Iterator

import pytest

from tests.core import rig


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module that defines `GROUNDS` on each of these grounds."""
    grounds = getattr(metafunc.module, "GROUNDS", ())
    if grounds:
        only = ["host"] if getattr(metafunc.function, "host_only", False) else grounds
        metafunc.parametrize("ground", only, indirect=True)


@pytest.fixture(autouse=True)
def ground(request: pytest.FixtureRequest) -> Iterator[None]:
    rig.GROUND = getattr(request, "param", "host")
    yield
    rig.GROUND = "host"


@pytest.fixture(scope="module", autouse=True)
def strangers() -> Iterator[None]:
    rig.STRANGERS.clear()
    rig.STRANGERS.update(os.fstat(fd).st_ino for fd in rig.memfds())
    yield
    rig.STRANGERS.clear()
