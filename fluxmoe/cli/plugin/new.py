"""``fluxmoe plugin new``: create a package with a minimal policy or codec and its tests."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fluxmoe.errors import ConfigError, MissingDependencyError

TEMPLATE = Path(__file__).parents[2] / "templates" / "plugin"


class Kind(StrEnum):
    """The contents of the package."""

    EVICTION = "eviction"
    PREFETCH = "prefetch"
    ARBITRATION = "arbitration"
    CODEC = "codec"


def new(
    name: Annotated[
        str, typer.Argument(help="Name; my-policy gives the package fluxmoe-my-policy.")
    ],
    kind: Annotated[
        Kind,
        typer.Option(metavar="|".join(Kind), help="Kind of policy, or codec."),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Target folder; default: ./fluxmoe-NAME.")
    ] = None,
) -> None:
    """Create a package with a minimal policy or codec, and tests that call the conformance kit."""
    import fluxmoe
    from fluxmoe import plugins

    short = name.removeprefix("fluxmoe-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short):
        raise ConfigError(
            f"not a valid package name: {name!r}",
            where="NAME",
            fix="use lower-case letters, digits and hyphens, as in my-policy",
        )
    what = "codec" if kind is Kind.CODEC else f"{kind.value} policy"
    known = {(r.kind, r.name): r.plugin for r in plugins.load().everything()}
    if plugin := known.get((kind.value, short)):
        raise ConfigError(
            f"{plugin} already registers the {what} {short!r}",
            where="NAME",
            fix="choose another name",
        )
    folder = output or Path(f"fluxmoe-{short}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} already exists", where="--output", fix="name a new or empty folder"
        )
    try:
        import copier
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is needed to create a package", fix="pip install 'fluxmoe[plugin]'"
        ) from error
    module = f"fluxmoe_{short.replace('-', '_')}"
    noun = "Codec" if kind is Kind.CODEC else "Policy"
    made = "".join(word.capitalize() for word in short.split("-"))
    data = {
        "name": short,
        "kind": kind.value,
        "module": module,
        "class_name": made if made.endswith(noun) else made + noun,
        "fluxmoe_version": fluxmoe.__version__,
        "plugin_api": fluxmoe.PLUGIN_API,
    }
    try:
        copier.run_copy(str(TEMPLATE), folder, data=data, defaults=True, quiet=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}", where="--output") from error
    print(f"{folder}: a package fluxmoe-{short} with the {what} {short!r}")
    print(f"  pip install -e '{folder}[test]' && pytest {folder}")
    print(f"  fluxmoe plugin check {folder / module}.py")
