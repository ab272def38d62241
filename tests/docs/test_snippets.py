"""All snippets and commands in the README and the docs work as described."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks

from . import commands
from .commands import options
from .pages import FIRST_HOUR, PAGES, ROOT, WrongPage, blocks, run, run_with_vllm

FRESH = [
    page
    for page in PAGES
    if page in FIRST_HOUR or any("fresh" in block.directives for block in blocks(page))
]
RUNNABLE = [
    page
    for page in PAGES
    if page not in FRESH
    and any(block.language in ("python", "console", "bash") for block in blocks(page))
]
WITH_VLLM = [
    page for page in PAGES if page not in FRESH and any(b.needs_vllm for b in blocks(page))
]


def _param(page: Path) -> object:
    slow = any("slow" in block.directives for block in blocks(page))
    return pytest.param(
        page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] if slow else []
    )


@pytest.mark.parametrize("page", [_param(page) for page in RUNNABLE])
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, tmp_path)


@pytest.mark.vllm
@pytest.mark.parametrize("page", [_param(page) for page in WITH_VLLM])
def test_page_with_vllm(page: Path, tmp_path: Path) -> None:
    run_with_vllm(page, tmp_path)


def test_the_pages_have_something_to_run() -> None:
    names = {page.name for page in RUNNABLE}
    assert {"built-in-policies.md", "simulator.md"} <= names
    assert {page.name for page in WITH_VLLM} == {"vllm.md", "changing-weights.md"}


# --- tests of ``run`` -----------------------------------------------------------------------------

PLUGIN = '''```python title="p.py"
import fluxmoe
class P(fluxmoe.EvictionPolicy):
    """Shown."""
    def score(self, view, pages):
        return view.last_use[pages]
@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("p", P)
```
'''
VERSION = "```console\n$ fluxmoe --version\nfluxmoe 0.0.0\n```\n"


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.not_run for b in blocks(page))], ids=lambda p: p.name
)
def test_what_is_not_run_exists(page: Path) -> None:
    known = {verb: options(command) for verb, command in commands.verbs()}
    for block in (block for block in blocks(page) if block.not_run):
        for line in block.body.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert words[1] in _targets(), line
            elif words[:3] == ["python", "-m", "benchmarks"]:
                assert words[3] in benchmarks.BENCHMARKS | benchmarks.CHECKS, line
            elif words[:1] == ["python"] and words[1] != "-m":
                assert (ROOT / words[1]).is_file(), line
            elif words[:1] == ["fluxmoe"]:
                verb = next(v for v in (" ".join(words[1:3]), words[1]) if v in known)
                given = {word.strip("[]") for word in words if word.strip("[]").startswith("--")}
                assert given <= known[verb], line


def _run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    page = folder / "page.md"
    page.write_text(text)
    monkeypatch.chdir(folder)
    return run(page, folder)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("```python\nx = 1\n```\ntext\n```python\nassert x == 1\n```\n", 2),
        ("- item\n\n    ```console\n    ```\n", 0),
        (PLUGIN + "```console\n$ fluxmoe policies --plugin p.py\n```\n", 2),
        (VERSION, 1),  # not marked exact
        ("```console\n$ fluxmoe demo\n```\n", 0),
        ("<!-- exit 2 -->\n```console\n$ fluxmoe nosuch\n```\n", 1),
        ("```python\nfrom fluxmoe.backends import vllm\n```\n", 1),
        ("<!-- not run: it fails -->\n```bash\nexit 1\n```\n", 0),
        ("```bash\nfluxmoe --version > version\ngrep fluxmoe version\n```\n", 1),
        (
            '```yaml title="a.yaml"\nmemory: {budget: 1GiB}\n```\n'
            "```console\n$ fluxmoe config check a.yaml\n```\n",
            1,
        ),
    ],
)
def test_right_pages_pass(
    text: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(text, tmp_path, monkeypatch) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nx = 1\nassert x == 2\n```\n", r"page.md:2: AssertionError"),
        ("```python\nfrom fluxmoe import Nosuch\n```\n", r"page.md:2: ImportError"),
        ("```python\nx = = 1\n```\n", r"invalid syntax"),
        ("<!-- needs vllm -->\n```python\nx = = 1\n```\n", r"invalid syntax"),
        ('```python title="p.py"\nimport fluxmoe.nosuch\n```\n', r"ModuleNotFoundError"),
        ("```console\n$ fluxmoe nosuch\n```\n", r"status 2"),
        ("<!-- exit 2 -->\n```console\n$ fluxmoe --version\n```\n", r"status 0"),
        ("<!-- exact -->\n" + VERSION, r"but the page shows\n+fluxmoe 0.0.0"),
        ("<!-- exakt -->\n" + VERSION, r"unknown directive 'exakt'"),
        ("```bash\nfluxmoe nosuch\ntrue\n```\n", r"page.md:2: status 2"),
        ("```bash\nfalse | true\n```\n", r"page.md:2: status 1"),
        ("<!-- not run: -->\n```bash\nfalse\n```\n", r"unknown directive 'not run:'"),
        ("```sh\ntrue\n```\n", r"write ```bash"),
        ("```console\n$ ls\n```\n", r"'ls' cannot be tested"),
        ("```console\nfluxmoe --version\n```\n", r"begins with a \$ line"),
    ],
)
def test_wrong_pages_fail(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WrongPage, match=message):
        _run(text, tmp_path, monkeypatch)


def test_a_wrong_snippet_with_vllm_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- needs vllm -->\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(WrongPage, match=r"line 4, in <module>"):
        run_with_vllm(page, tmp_path)
