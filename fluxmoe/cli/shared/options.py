"""Options that several verbs share, and the parser for list options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxmoe import caches
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
Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="host|file|FOLDER",
        help="Where all experts are kept: in host memory, or in a page file, which is reused by "
        "later runs, in the user's cache folder or in FOLDER.",
    ),
]


def stores(store: str, folder: Path = Path()) -> list[dict[str, str]]:
    """Make the configuration of the stores that the option ``--store`` describes.

    Args:
        store: Value of the option.
        folder: Folder against which a relative path is resolved.

    Raises:
        ConfigError: The option is empty.
    """
    if not store:
        raise ConfigError("no store given", where="--store", fix="give host, file or a folder")
    if store in ("host", "file"):
        return [{"kind": store}]
    return [{"kind": "file", "path": str(folder / caches.expanded(store))}]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
