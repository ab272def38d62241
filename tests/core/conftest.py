"""The core's tests look at the process they run in, which other test files have used before."""

import os
from collections.abc import Iterator

import pytest

from tests.core import rig


@pytest.fixture(scope="module", autouse=True)
def strangers() -> Iterator[None]:
    rig.STRANGERS.clear()
    rig.STRANGERS.update(os.fstat(fd).st_ino for fd in rig.memfds())
    yield
    rig.STRANGERS.clear()
