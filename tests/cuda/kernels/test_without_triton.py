"""Functions that work without Triton, and errors of functions that need it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDE = "import sys; sys.modules['triton'] = None; "


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_modules_need_neither_triton_nor_torch() -> None:
    code = "import fluxmoe.cuda.kernels.tiles, fluxmoe.cuda.kernels.choice; "
    assert run(code + "print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("module", ["experts", "gemm", "pages", "paging"])
def test_kernels_say_what_is_missing(module: str) -> None:
    code = (
        "from fluxmoe.errors import MissingDependencyError\n"
        f"try: import fluxmoe.cuda.kernels.{module}\n"
        "except MissingDependencyError as error: print(error)"
    )
    assert run(code).startswith("FM404: the GPU kernels need Triton")
