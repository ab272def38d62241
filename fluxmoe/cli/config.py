"""``fluxmoe config``: check a configuration, print it with its defaults, or print the schema."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output

if TYPE_CHECKING:
    from fluxmoe.config import Config

app = typer.Typer(
    help="Check configurations, and print them or their schema.", no_args_is_help=True
)

_File = Annotated[Path, typer.Argument(help="A YAML file.")]
_KINDS = ("eviction", "prefetch", "arbitration")


@app.command()
def check(file: _File) -> None:
    """Check all that can be checked without starting an engine; exit with status 2 on errors.

    Checks keys, values, policies and their options, vLLM's options, the model's files, and the
    memory and disk space of this machine.
    """
    from fluxmoe import config
    from fluxmoe.backends.vllm.preflight import checks
    from fluxmoe.findings import Findings

    found = Findings()
    loaded = config.load_most(file, found)
    ready = loaded and checks.examine(loaded, os.environ, found, start="later")
    found.require()
    assert loaded is not None
    assert ready is not None
    print(f"{file}: ok")
    for note in found.notes:
        print(f"note: {note}")
    for line in _resolved(loaded, ready):
        print(line)


@app.command()
def schema() -> None:
    """Print the JSON schema that editors use to complete and check configurations."""
    from fluxmoe import config

    output.print_json(config.json_schema())


@app.command()
def show(
    file: _File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print the configuration with all defaults filled in; the output is a valid configuration."""
    import yaml

    from fluxmoe import config
    from fluxmoe.backends.vllm.preflight import checks

    loaded = config.load(file)
    shown = _shown(loaded)
    if as_json:
        output.print_json(shown)
    else:
        yaml.safe_dump(shown, sys.stdout, sort_keys=False, allow_unicode=True)
        for line in _resolved(loaded, checks.resolved(loaded) if loaded.model else loaded):
            print(f"# {line}")


def _shown(loaded: Config) -> dict[str, Any]:
    """Return the configuration as ``show`` prints it; create its policies and codecs as a check."""
    from fluxmoe import plugins
    from fluxmoe.backends.stores import make_coders

    shown = {key: _readable(getattr(loaded, key)) for key in type(loaded).model_fields}
    registry = plugins.load(loaded.plugins)
    registry.policies(loaded)
    registry.arbitration(loaded)
    make_coders(loaded, registry)
    for kind in _KINDS:
        spec: dict[str, Any] = getattr(loaded, kind)
        options = registry.get(kind, spec["kind"]).config_model
        if options is not None:
            given = {key: value for key, value in spec.items() if key != "kind"}
            filled = options.model_validate(given).model_dump(mode="json")
            shown[kind] = {"kind": spec["kind"], **filled}
        else:
            shown[kind] = spec["kind"]
    return shown


def _resolved(loaded: Config, ready: Config) -> list[str]:
    """Explain the preset ``off``, and a budget of ``auto`` that has a value in ``ready``."""
    from fluxmoe.backends import budget

    lines = []
    if loaded.preset == "off":
        lines.append("preset: off serves without paging; policies have no effect")
    if loaded.memory.budget is None and ready.memory.budget is not None:
        size = sizes.shown(ready.memory.budget)
        lines.append(
            f"memory.budget: auto is currently {size} per worker, {budget.SHARE:.0%} of the "
            "free memory after the model's weights"
        )
    return lines


def _readable(value: Any) -> Any:
    """Convert a value to the form it has in a configuration: sizes with units, and ``auto``."""
    from pydantic import BaseModel, ByteSize

    if isinstance(value, ByteSize):
        return sizes.exact(value)
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if isinstance(value, BaseModel):
        # Only sizes set to auto may be None in nested fields.
        return {key: "auto" if item is None else _readable(item) for key, item in value}
    if isinstance(value, dict) and value.keys() == {"kind"}:
        return value["kind"]
    return value
