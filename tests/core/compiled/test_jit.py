"""Compiled code is cached on disk, but not across changes to the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import fluxmoe
from fluxmoe.core.compiled.jit import jit

#: Only a few functions from two files, because every run below recompiles them.
COUNT = """
import numpy as np
from fluxmoe.core.paging.event import open_event
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.types import Geometry
table = PageTable(Geometry(4, 4), [6])
open_event(table.books, 0, 0, np.array([0, 1]), np.zeros(0, np.int32))
print(table.counters().misses, table.books.counts.tolist())
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Make a modifiable copy of the package without machine code."""
    no_cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(fluxmoe.__file__).parent, tmp_path / "fluxmoe", ignore=no_cache)
    return tmp_path


def run(copy: Path, before: str = "", program: str = COUNT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", before + program],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_change_in_one_file_reaches_the_compiled_code_of_another(copy):
    assert run(copy).startswith("2 [1, 2, 0, 2,")
    assert list((copy / "fluxmoe/core/paging/__pycache__").glob("event.open_event*.nbc"))
    pages = copy / "fluxmoe/core/paging/books.py"
    text = pages.read_text()
    swapped = text.replace("    C_HITS,\n    C_MISSES,\n", "    C_MISSES,\n    C_HITS,\n")
    assert swapped != text
    pages.write_text(swapped)
    assert run(copy).startswith("0 [1, 2, 2, 0,")  # event.py is unchanged, but not its constants


@pytest.mark.parametrize("user", ["core/first", "outside"])
def test_a_change_in_one_folder_reaches_the_compiled_code_of_another(copy, user):
    package = copy / "fluxmoe"
    for folder in (package / user, package / "core/second/inner"):
        folder.mkdir(parents=True)
    give, use = package / "core/second/inner/give.py", package / user / "use.py"
    head = "from fluxmoe.core.compiled.jit import jit\n"
    give.write_text(f"{head}@jit\ndef give():\n    return 1\n")
    use.write_text(
        f"{head}from fluxmoe.core.second.inner.give import give\n"
        "@jit\ndef use():\n    return give() + 10\n"
    )
    call = f"from fluxmoe.{user.replace('/', '.')}.use import use; print(use())"
    assert run(copy, program=call) == "11\n"
    machine_code = list(use.parent.glob("__pycache__/use.use*.nbc"))
    assert len(machine_code) == 1
    assert run(copy, program=call) == "11\n"
    assert list(use.parent.glob("__pycache__/use.use*.nbc")) == machine_code
    give.write_text(give.read_text().replace("return 1", "return 2"))
    assert run(copy, program=call) == "12\n"


def test_a_change_of_a_tuple_from_a_file_without_compiled_code_reaches_its_users(copy):
    types = copy / "fluxmoe/core/types.py"
    name = "from fluxmoe.core.paging.replay import look_ahead as f; print(f.py_func.__qualname__)"
    before = run(copy, program=name)  # names the machine code of `look_ahead`
    types.write_text(types.read_text().replace("    later: Int64s", "    next_use: Int64s"))
    assert run(copy, program=name) != before


def test_machine_code_of_another_version_is_no_obstacle(copy):
    run(copy)
    for path in (copy / "fluxmoe/core").rglob("*.py"):  # numba's index contains the class's name
        path.write_text(path.read_text().replace("Books", "Ledger"))
    assert run(copy).startswith("2 [1, 2, 0, 2,")


def test_it_runs_where_nothing_can_be_cached(copy):
    # An unusable locator has the same effect as no privileges and no home folder.
    assert run(copy, NUMBA_CACHE_LOCATOR_CLASSES="_ZipCacheLocator").startswith("2 [1, 2, 0, 2,")


def test_it_runs_where_the_disk_is_full_and_from_damaged_machine_code(copy):
    cache = copy / "cache"
    # No file may grow: every write fails, but an empty file can still be created.
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    assert run(copy, before=full, NUMBA_CACHE_DIR=str(cache)).startswith("2 [1, 2, 0, 2,")
    assert not list(cache.rglob("*.nb?"))
    run(copy, NUMBA_CACHE_DIR=str(cache))
    for kind in ("*.nbc", "*.nbi"):  # damage one function's code, and the index of the next
        files = sorted(cache.rglob(kind))
        for path in files[kind == "*.nbi" :: 2]:
            path.write_bytes(path.read_bytes()[:40])
    assert run(copy, NUMBA_CACHE_DIR=str(cache)).startswith("2 [1, 2, 0, 2,")


def get(row: npt.NDArray[np.int64], grid: npt.NDArray[np.int64], i: int) -> int:
    return int(row[i] + 100 * grid[1, i] + 10_000 * row[1:][i] + 1_000_000 * row[-1])


def put(row: npt.NDArray[np.int64], grid: npt.NDArray[np.int64], i: int) -> int:
    row[i], grid[1, i] = 70, 71
    return 0


def test_no_index_is_looked_at_whether_it_is_negative():
    # In compiled code, a variable index of −1 reads the element before the array, which a view of a
    # larger array makes visible. A constant index of −1 reads the last element.
    whole, grid = np.arange(10), np.arange(40).reshape(2, 20)
    row = whole[5:]
    compiled = jit(get)
    assert compiled(row, grid, 2) == get(row, grid, 2) == 9_082_207
    assert compiled(row, grid, -1) == 9_051_904
    jit(put)(row, grid, -1)
    assert whole[4] == 70 and whole[9] == 9
    assert grid[0, 19] == 71 and grid[1, 19] == 39


LISTENING = """
import logging, sys
logging.getLogger("fluxmoe.compile").setLevel(logging.INFO)
logging.getLogger("fluxmoe.compile").addHandler(logging.StreamHandler(sys.stdout))
"""


def test_c9_compilation_is_announced_once_and_only_if_it_happens(copy):
    said = "compiling inner loops of FluxMoE, which later runs reuse: up to half a minute\n"
    assert run(copy, LISTENING).startswith(f"{said}2 [")
    assert run(copy, LISTENING).startswith("2 [")
    assert run(copy).startswith("2 [")


def test_c9_a_policy_s_victims_are_compiled_once():
    """Numba types literals separately, so a literal argument would cause a second compilation."""
    program = (
        "from fluxmoe.core.paging.victims import victims\n"
        "from fluxmoe.sim.simulator import simulate\n"
        "from fluxmoe.trace import shipped\n"
        "simulate(shipped.path('decode-1'), 'lru', '50%')\n"
        "print(len(victims.signatures))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "1\n", done.stdout
