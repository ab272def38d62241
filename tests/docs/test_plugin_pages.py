"""The pages on plugins list every hook, rule, fixture, golden trace and option."""

from __future__ import annotations

import inspect
import re

import pytest
import typer

import _fluxmoe_pytest
import fluxmoe
import fluxmoe.testing
from fluxmoe import hookspecs
from fluxmoe.cli import plugin
from fluxmoe.cli.plugin.new import Kind
from fluxmoe.testing import GOLDEN
from fluxmoe.testing.conformance import arbitration, codec, eviction, prefetch

from .pages import ROOT

PLUGINS = ROOT / "docs" / "plugins"


def text(name: str) -> str:
    return (PLUGINS / name).read_text()


def first_cells(name: str, heading: str) -> list[str]:
    """Read the first column of the first table below a heading, without backquotes."""
    rows = r"(?:^\|.*\n)+"
    table = re.search(rows, text(name).split(f"## {heading}\n", 1)[1], re.M)
    assert table is not None
    return [line.split("|")[1].strip(" `") for line in table[0].splitlines()[2:]]


def test_every_hook_and_every_argument_of_register_is_listed() -> None:
    hooks = [
        f"{name}({', '.join(inspect.signature(hook).parameters)})"
        for name, hook in vars(hookspecs).items()
        if name.startswith("fluxmoe_")
    ]
    assert first_cells("index.md", "Hooks") == hooks
    for name in list(inspect.signature(hookspecs.Register.__call__).parameters)[1:]:
        assert f"| `{name}` |" in text("index.md")


def test_every_rule_is_listed_with_its_kinds() -> None:
    kinds: dict[str, list[str]] = {}
    for module in (eviction, prefetch, arbitration, codec):
        for rule in module.RULES:
            kinds.setdefault(rule.name, []).append(module.__name__.rpartition(".")[2])
    rows = re.findall(r"^\| ([\w ]+) \| ([\w, ]+) \| .{10,} \|$", text("testing.md"), re.M)
    assert dict(rows[1:]) == {
        name: "all" if len(which) == 4 else ", ".join(which) for name, which in kinds.items()
    }


def test_every_fixture_and_golden_trace_is_listed() -> None:
    fixtures = [name for name in vars(_fluxmoe_pytest) if name.startswith("fluxmoe_")]
    assert first_cells("testing.md", "Fixtures") == fixtures
    assert first_cells("testing.md", "Golden traces") == list(GOLDEN)


@pytest.mark.parametrize("name", fluxmoe.testing.__all__)
def test_every_public_name_of_the_kit_is_mentioned(name: str) -> None:
    assert re.search(rf"\b{name}\b", text("testing.md"))


def test_every_option_of_plugin_is_mentioned() -> None:
    group = typer.main.get_command(plugin.app)
    words = text("testing.md") + text("tutorial.md")
    for verb in group.commands:  # type: ignore[attr-defined]
        assert f"fluxmoe plugin {verb} " in words
    for option in ("--policy", "--json", "--kind"):
        assert f"`{option}" in words
    for kind in Kind:
        assert (PLUGINS / f"{kind.value}.md").exists()


def test_the_api_that_the_page_names_is_the_present_one() -> None:
    assert f"version is {fluxmoe.PLUGIN_API}." in text("compatibility.md")
