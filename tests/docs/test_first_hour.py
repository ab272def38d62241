"""A newcomer's first hour, word for word, in a clean environment and a terminal of 80 columns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests import fresh

from .pages import ROOT, WrongPage, blocks, follow
from .test_snippets import FRESH

pytestmark = pytest.mark.slow


def _param(page: Path) -> object:
    needed = any(block.needs_vllm for block in blocks(page))
    return pytest.param(
        page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.vllm] if needed else []
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make the environment after `pip install fluxmoe`, with pip offline."""
    wheels = fresh.build(tmp_path_factory.mktemp("wheels"), [ROOT])
    python = fresh.install(tmp_path_factory.mktemp("fresh"), wheels, with_pip=True)
    script = python.parent / "pytest"  # pip regards pytest as installed and creates no script
    script.write_text(f'#!/bin/sh\nexec {python} -m pytest "$@"\n')
    script.chmod(0o755)
    base = fresh.environment(VIRTUAL_ENV=str(python.parents[1]))
    # "0" is correct: pip inverts the variables of options that begin with "no".
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    return {**base, **offline, "PATH": f"{python.parent}:{base['PATH']}"}


@pytest.mark.skipif(importlib.util.find_spec("copier") is None, reason="copier is not installed")
@pytest.mark.parametrize("page", [_param(page) for page in FRESH])
def test_a_page_can_be_followed(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    assert follow(page, tmp_path, environment) >= 2


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
