"""The reference pages are complete, and mention only what exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pydantic
import pytest
import yaml
from pydantic.fields import FieldInfo

import fluxmoe
from fluxmoe import config, errors, plugins, testing
from fluxmoe.backends.vllm.metrics import METRICS
from fluxmoe.sim import hardware
from fluxmoe.sim.clock import Timing
from fluxmoe.sim.hardware import Profile
from fluxmoe.sim.simulator import Result

from . import commands, pictures
from .commands import options
from .pages import PAGES, ROOT, blocks

DOCS = ROOT / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text()


def headings(name: str) -> set[str]:
    """List headings that are code, without the backquotes."""
    return set(re.findall(r"^#+ `([^`]+)`", text(name), flags=re.MULTILINE))


def rows(name: str, section: str) -> list[list[str]]:
    """List the cells of the first table below a heading."""
    table = re.search(r"(?:^\|.*\n)+", text(name).split(f"## {section}\n", 1)[1], re.MULTILINE)
    assert table is not None
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# --- design --------------------------------------------------------------------------


def test_the_files_and_packages_of_the_design_page_are_there() -> None:
    package = Path(fluxmoe.__file__).parent
    named = re.findall(r"`((?:\w+/)+\w+(?:\.py)?)`", text("concepts/design.md"))
    assert len(named) > 30
    assert [name for name in named if not (package / name).exists()] == []
    # The table of parts has all packages and modules of the first level, except data.
    table = "\n".join(row[0] for row in rows("concepts/design.md", "Parts"))
    there = {path.stem for path in package.iterdir() if path.suffix in ("", ".py")}
    there -= {"__init__", "__pycache__", "errors", "templates"}
    assert {name for name in there if f"`{name}`" not in table} == set()


# --- errors ---------------------------------------------------------------------------------------


def test_every_error_is_listed() -> None:
    listed = re.findall(
        r"^\| (FM\d+) \| `(\w+)` \| .{10,} \|$", text("reference/errors.md"), re.MULTILINE
    )
    classes = [
        error
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.FluxMoEError)
    ]
    assert listed == sorted((error.code, error.__name__) for error in classes)


def test_no_page_names_a_code_that_does_not_exist() -> None:
    known = {code for code, _ in re.findall(r"\| (FM\d+) \| `(\w+)`", text("reference/errors.md"))}
    for page in PAGES:
        assert set(re.findall(r"FM\d{3}", page.read_text())) <= known, page.name


# --- configuration --------------------------------------------------------------------------------


def keys(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every configuration key in dotted form, with list entries as ``name[]``."""
    for name, field in model.model_fields.items():
        inner, entry = field.annotation, ""
        if getattr(inner, "__origin__", None) is list:
            inner, entry = inner.__args__[0], "[]"  # type: ignore[union-attr]
        union = get_args(get_args(inner)[0]) if get_origin(inner) is Annotated else (inner,)
        nested = [t for t in union if isinstance(t, type) and issubclass(t, pydantic.BaseModel)]
        if not nested or entry:
            yield prefix + name, field
        # Keys that several kinds share are listed only once.
        yield from {
            key: field for model in nested for key, field in keys(model, f"{prefix}{name}{entry}.")
        }.items()


def shown(key: str, field: FieldInfo) -> str:
    """Format a default as on the page."""
    if field.is_required():
        return "required"
    value: Any = field.default
    if value is None:
        return "`null`" if key == "model" else "`auto`"
    if isinstance(value, dict) and set(value) == {"kind"}:
        return f"`{value['kind']}`"
    if isinstance(value, list) and value:
        return "`[" + ", ".join(f"{{kind: {store.kind}}}" for store in value) + "]`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def test_every_key_is_listed_with_its_default() -> None:
    listed = {
        key.strip("`"): default for key, _, default, _ in rows("reference/configuration.md", "Keys")
    }
    assert listed == {key: shown(key, field) for key, field in keys(config.Config)}


@pytest.mark.parametrize("page", [page for page in PAGES if "```yaml" in page.read_text()])
def test_yaml_examples_are_valid(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            config.parse(yaml.safe_load(block.body), where=block.where)


# --- policies -------------------------------------------------------------------------------------


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize(
    "contract", [fluxmoe.EvictionPolicy, fluxmoe.PrefetchPolicy, fluxmoe.ArbitrationPolicy]
)
def test_every_method_of_a_contract_has_a_heading(contract: type) -> None:
    for name, member in vars(contract).items():
        if not name.startswith("_") and inspect.isfunction(member):
            arguments = ", ".join(parameter.name for parameter in _parameters(member)[1:])
            assert f"{name}({arguments})" in headings("reference/policies.md")
        elif not name.startswith("_"):
            assert f"`{name}" in text("reference/policies.md")


def test_no_heading_promises_a_method_that_does_not_exist() -> None:
    contracts = (fluxmoe.EvictionPolicy, fluxmoe.PrefetchPolicy, fluxmoe.ArbitrationPolicy)
    known = {name for contract in contracts for name in vars(contract)}
    names = {heading.partition("(")[0] for heading in headings("reference/policies.md")}
    assert names <= known | {"view", "access"}


@pytest.mark.parametrize(
    "seen",
    [
        *sorted(n for n in vars(fluxmoe.PageView) if not n.startswith("_")),
        *("last_use", "use_count", "loaded_at", "num_layers", "experts_per_layer", "rng"),
        *(field.name for field in fields(fluxmoe.Access)),
        *(field.name for field in fields(fluxmoe.ArbitrationView)),
    ],
)
def test_what_policies_see_is_listed(seen: str) -> None:
    assert re.search(rf"`(view\.)?{seen}(\(.*\))?`", text("reference/policies.md")), seen


def test_every_built_in_policy_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.ALLOW_LIST, "")
    listed = {
        (kind, name)
        for kind, name in re.findall(
            r"^\| (\w+) \| `([\w-]+)`", text("concepts/built-in-policies.md"), re.MULTILINE
        )
    }
    assert listed == {(policy.kind, policy.name) for policy in plugins.load()}


# --- the rest -------------------------------------------------------------------------------------


def test_every_counter_is_listed() -> None:
    listed = {
        name
        for row in rows("concepts/event-rule.md", "Counters")
        for name in re.findall(r"`(\w+)`", row[0])
    }
    assert listed == {field.name for field in fields(fluxmoe.Counters)}


def test_every_metric_is_listed() -> None:
    listed = [
        (name.strip("`"), kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _ in rows("reference/metrics.md", "List of metrics")
    ]
    assert listed == [(metric.name, metric.kind, metric.labels) for metric in METRICS]


@pytest.mark.parametrize(
    "verb, page",
    [
        ("simulate", "reference/simulator.md"),
        ("plan", "guides/plan.md"),
        ("limit", "concepts/arbitration.md"),
    ],
)
def test_every_option_of_a_command_is_listed(verb: str, page: str) -> None:
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(getattr(importlib.import_module(f"fluxmoe.cli.{verb}"), verb))
    found = options(typer.main.get_command(app))
    assert len(found) > 6
    assert not {option for option in found if f"`{option}`" not in text(page)}


def test_everything_in_a_plan_is_listed() -> None:
    from fluxmoe.dimensions import Model
    from fluxmoe.plan.advice import Plan, Point

    for field in (*fields(Plan), *fields(Point), *fields(Model)):
        assert field.name == "work" or f"`{field.name}`" in text("guides/plan.md"), field.name


def test_every_verb_option_and_format_of_traces_is_listed() -> None:
    import typer

    from fluxmoe.cli import trace
    from fluxmoe.trace.formats import FORMATS

    group = typer.main.get_command(trace.app)
    for verb, command in group.commands.items():  # type: ignore[attr-defined]
        assert f"$ fluxmoe trace {verb} " in text("reference/traces.md")
        if verb != "info":
            table = (
                text("reference/traces.md")
                .split(f"| option of `{verb}` |", 1)[1]
                .split("\n\n", 1)[0]
            )
            assert not {option for option in options(command) if f"`{option}`" not in table}
    assert {row[0].strip("`") for row in rows("reference/traces.md", "Converting a trace")} == set(
        FORMATS
    )


def test_every_result_of_the_simulator_is_shown() -> None:
    (shown,) = (
        json.loads(output[output.index("[\n") :])  # after the notes, which go to standard error
        for block in blocks(DOCS / "reference" / "simulator.md")
        if block.language == "console"
        for words, output in block.commands()
        if "--json" in words
    )
    assert list(shown[0]) == [field.name for field in fields(Result) if field.name != "timing"]


@pytest.mark.parametrize(
    "name", [*(field.name for field in fields(Timing)), *Profile.model_fields, *hardware.names()]
)
def test_timings_profiles_and_their_fields_are_listed(name: str) -> None:
    assert f"`{name}`" in text("reference/simulator.md")


def test_the_page_of_the_command_line_is_what_the_command_line_says() -> None:
    """To fix a failure, run ``python -m tests.docs.commands``."""
    assert commands.PAGE.read_text() == commands.page()
    assert {verb.split()[0] for verb, _ in commands.verbs()} == set(commands.EXPLAINED)


@pytest.mark.slow
@pytest.mark.parametrize("name", pictures.MADE)
def test_computed_pictures_show_what_is_computed(name: str) -> None:
    """To fix a failure, run ``python -m tests.docs.pictures``."""
    assert (pictures.FOLDER / name).read_text() == pictures.MADE[name]()


def test_every_picture_is_shown_and_has_colours_for_the_dark() -> None:
    shown = "".join(page.read_text() for page in PAGES)
    for picture in pictures.FOLDER.iterdir():
        assert f"pictures/{picture.name})" in shown, picture.name
        assert "@media (prefers-color-scheme: dark)" in picture.read_text(), picture.name
    assert set(pictures.MADE) < {picture.name for picture in pictures.FOLDER.iterdir()}


def test_every_public_name_is_in_the_api() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", text("reference/api.md"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    for module in (fluxmoe, testing):
        for name in set(module.__all__) - {"GOLDEN", "PLUGIN_API", "hookimpl", "hookspec"}:
            assert f"{module.__name__}.{name}" in listed
    for name in listed:
        home, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(home), attribute).__doc__, name


def imported(code: str) -> set[str]:
    """List the names that Python code imports from FluxMoE."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fluxmoe":
            names |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names if name.name.startswith("fluxmoe.")}
    return names


def test_snippets_examples_and_plugins_import_public_names_only() -> None:
    code = {block.where: block.body for page in PAGES for block in blocks(page)
            if block.language == "python"}  # fmt: skip
    code |= {str(path): path.read_text() for folder in ("examples", "plugins")
             for path in (ROOT / folder).rglob("*.py")}  # fmt: skip
    named = set(re.findall(r"\bfluxmoe(?:\.\w+)+", text("reference/api.md")))
    public = {".".join(name.split(".")[:end]) for name in named for end in range(2, 9)}
    public |= {f"{error.__module__}.{name}" for name, error in vars(errors).items()
               if isinstance(error, type)}  # fmt: skip
    wrong = {(where, name) for where, body in code.items() for name in imported(body) - public}
    assert not wrong, "use a public name, or list it in docs/reference/api.md"


# --- links ----------------------------------------------------------------------------------------

LINKING = [
    *PAGES,
    *sorted(path for path in ROOT.glob("*.md") if path.name != "README.md"),
    *sorted(path for folder in ("benchmarks", "examples", "plugins", "fluxmoe")
            for path in (ROOT / folder).rglob("*.md")),
]  # fmt: skip


def links(page: Path) -> set[str]:
    """List the targets of a page's links and pictures, outside code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    inline = re.findall(r"\]\(([^)\s]+)\)", prose)
    return {*inline, *re.findall(r"^\[[^\]]+\]: (\S+)$", prose, re.MULTILINE)}


def anchors(page: Path) -> set[str]:
    """List the anchors of a page."""
    from markdown.extensions.toc import slugify

    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {slugify(heading.replace("`", ""), "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if "://" in target:
            assert re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[^\s<>\"]*)?", target), target
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:", 1)[1]
    for page in DOCS.glob("**/*.md"):
        assert f" {page.relative_to(DOCS)}\n" in navigation + "\n"
