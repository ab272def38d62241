"""A newcomer's first hour, word for word, in a clean environment and a terminal of 80 columns.

The tests follow all commands on the pages, except in blocks marked ``not run``. In ``make test``,
which follows the short pages, another installation replaces that of the pages: ``pip install`` of a
wheel of this checkout, with the other packages from the current environment. In ``make test-full``,
the installation is the README's: a clone of the commit, in which ``make venv`` and ``make demo``
run, with the packages that pip finds with ``PIP_ARGS``; the pages are then followed in that
environment. In both cases, the tutorial's ``pip install`` is offline. The tests do not follow
``make test``, of which they are a part.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fresh

from .pages import ROOT, WrongPage, blocks, follow, in_terminal
from .test_snippets import FRESH

#: `make venv`, `make demo` and the pages take minutes on a slow machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

#: Variables that keep pip offline. "0" is correct: pip inverts variables of options that begin
#: with "no".
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}


#: Pages that take minutes. ``make test`` follows the others.
LONG = ("first-launch.md", "tutorial.md")


def _param(page: Path, *marks: pytest.MarkDecorator) -> object:
    needed = any(block.needs_vllm for block in blocks(page))
    return pytest.param(
        page, id=str(page.relative_to(ROOT)), marks=[*marks, *[pytest.mark.vllm] * needed]
    )


PAGES = pytest.mark.parametrize("page", [_param(page) for page in FRESH])
SHORT_PAGES = pytest.mark.parametrize(
    "page", [_param(page, *[pytest.mark.full] * (page.name in LONG)) for page in FRESH]
)
COPIER = pytest.mark.skipif(
    importlib.util.find_spec("copier") is None, reason="copier is not installed"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make the environment after `pip install fluxmoe`, with pip offline."""
    wheels = fresh.build(tmp_path_factory.mktemp("wheels"), [ROOT])
    python = fresh.install(tmp_path_factory.mktemp("fresh"), wheels, with_pip=True)
    script = python.parent / "pytest"  # pip considers pytest installed and creates no script
    script.write_text(f'#!/bin/sh\nexec {python} -m pytest "$@"\n')
    script.chmod(0o755)
    return _activated(python.parents[1])


@pytest.fixture(scope="module")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Make the environment of `.venv` in a clone of this commit, after `make venv`."""
    clone = tmp_path_factory.mktemp("clone") / "fluxmoe"
    if subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=False).returncode:
        pytest.skip("this is not a checkout of a repository")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    lock = (clone / "requirements/cpu.lock").read_text().splitlines()
    one = next(line for line in lock if line.startswith("iniconfig=="))
    where = shlex.split(os.environ.get("PIP_ARGS", ""))
    if subprocess.run([*pip, "--no-deps", *where, one], check=False).returncode:
        pytest.skip("pip finds no packages for `make venv` on this machine: give PIP_ARGS")
    _make("venv", clone)
    yield _activated(clone / ".venv")
    shutil.rmtree(clone)  # 2.8 GB, which pytest would keep for three runs


def _activated(venv: Path) -> dict[str, str]:
    base = fresh.environment(VIRTUAL_ENV=str(venv))
    return {**base, **OFFLINE, "PATH": f"{venv / 'bin'}:{base['PATH']}"}


def _make(target: str, clone: Path) -> str:
    """Follow README's `make TARGET` in a terminal of 80 columns."""
    ours = ("MAKEFLAGS", "MAKELEVEL", "PYTEST_ARGS", "VLLM_CACHE_ROOT")
    given = {key: value for key, value in fresh.environment().items() if key not in ours}
    status, said = in_terminal(["make", target], clone, given)
    assert status == 0, said
    return said


@COPIER
@SHORT_PAGES
def test_a_page_can_be_followed(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    assert follow(page, tmp_path, environment) >= 2


@pytest.mark.full
@pytest.mark.vllm
def test_the_demo_of_a_clone(cloned: dict[str, str]) -> None:
    said = _make("demo", Path(cloned["VIRTUAL_ENV"]).parent)
    assert "identical" in said and "speed-up" in said


@pytest.mark.full
@PAGES
def test_a_page_can_be_followed_in_a_clone(
    page: Path, tmp_path: Path, cloned: dict[str, str]
) -> None:
    assert follow(page, tmp_path, cloned) >= 2


def test_a_wrong_turn_is_noticed(tmp_path: Path, environment: dict[str, str]) -> None:
    page = tmp_path / "page.md"
    block = "<!-- fresh, exact -->\n```console\n$ mkdir a\n$ cd a\n$ basename $PWD\n{}\n```\n"
    page.write_text(block.format("a"))
    assert follow(page, tmp_path, environment) == 3
    (tmp_path / "a").rmdir()
    page.write_text(block.format("b"))
    with pytest.raises(WrongPage, match=r"page.md:3: .*basename"):
        follow(page, tmp_path, environment)
    page.write_text("<!-- fresh -->\n```console\n$ false\n```\n")
    with pytest.raises(WrongPage, match=r"\$ false: 1"):
        follow(page, tmp_path, environment)


@pytest.mark.parametrize("shown", ["│" + 80 * "x", "1.2…"])
def test_a_table_too_wide_for_the_terminal(
    tmp_path: Path, environment: dict[str, str], shown: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```console\n$ echo {shown}\n```\n")
    with pytest.raises(WrongPage, match="wider than 80 columns, or cut"):
        follow(page, tmp_path, environment)


def test_the_pages() -> None:
    names = {"README.md", "getting-started.md", "first-launch.md", "tutorial.md"}
    assert {page.name for page in FRESH} == names
