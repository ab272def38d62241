"""A forked child cannot use its parent's paged model, and does not harm it, however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def found(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of ``forks.py``: case → the child's status and whether the parent is unharmed."""
    folder = tmp_path_factory.mktemp("forks")
    result = subprocess.run(
        [sys.executable, "-m", "tests.torch.forks", str(checkpoint()), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(result.stderr)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    [
        "use", "sys.exit", "os._exit", "end", "collect", "another model", "C fork, use",
        "C fork, sys.exit", "thread, use", "thread, sys.exit", "copies, use", "copies, sys.exit",
        "reads, use", "reads, sys.exit",
    ],
)  # fmt: skip
def test_a_child(found: Any, case: str) -> None:
    assert found[case] == [0, True]  # the child ended as intended, without side effects


def test_a_pool_that_evaluates_the_model(found: Any) -> None:
    assert found["pool"] == [["FM402"] * 4, True]


@pytest.mark.parametrize("case", ["sys.exit", "end"])
def test_a_child_of_a_recording(found: Any, case: str) -> None:
    (status, rows, complete, files), unharmed = found[f"recording, {case}"]
    assert (status, rows, complete, unharmed) == (0, True, True, True)
    assert files == ["forked", "pages", "plain"]


def test_harm_would_be_seen(found: Any) -> None:
    assert found["control"] is False
