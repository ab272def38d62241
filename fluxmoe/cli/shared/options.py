"""Options that several verbs share, and the parser for list options."""

from __future__ import annotations

from typing import Annotated

import typer

from fluxmoe.errors import ConfigError


def items(parameter: typer.CallbackParam, values: list[str] | None) -> list[str]:
    """Parse a list option, whose values may be separated by commas or given by repetition.

    Raises:
        ConfigError: The option was given without a value.
    """
    found = [item.strip() for value in values or () for item in value.split(",")]
    found = [item for item in found if item]
    if values and not found:
        raise ConfigError("no values given", where=parameter.opts[0])
    return found


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        callback=items,
        help="Plugins (.py files or modules), comma-separated or repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
