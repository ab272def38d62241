"""The built site has no warnings, is complete, and uses no external resources."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .pages import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    return folder


def test_every_page_is_there_with_a_heading(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        built = name.parent if name.name == "index" else name
        html = (site / built / "index.html").read_text()
        assert html.count("<h1") == 1, name
        assert "--8<--" not in html, name


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", page.read_text()
        )
        assert loaded
        assert not [each for each in loaded if each.startswith(("http", "//"))], page


def test_internal_links_and_pictures_are_there(site: Path) -> None:
    for page in site.rglob("index.html"):
        html = page.read_text()
        for target in re.findall(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"", html):
            name, _, anchor = target.partition("#")
            if "://" in name or name.startswith(("mailto:", "data:")):
                continue
            there = (page.parent / name).resolve() if name else page
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{page.relative_to(site)}: {target}"
            if anchor and there.suffix == ".html":
                assert f'id="{anchor}"' in there.read_text(), f"{page.relative_to(site)}: {target}"


def test_kept_to_what_the_successor_reads() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    names = [next(iter(each)) if isinstance(each, dict) else each for each in settings["plugins"]]
    assert names == ["search", "mkdocstrings"]
    assert not {"hooks", "exclude_docs", "custom_dir"} & set(settings) | {"custom_dir"} & set(
        settings["theme"]
    )
    assert "mkdocs>=1.6,<2" in (ROOT / "pyproject.toml").read_text()
