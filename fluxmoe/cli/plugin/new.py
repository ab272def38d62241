"""``fluxmoe plugin new``: a package with a policy or codec of a few lines, and its tests."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fluxmoe.errors import ConfigError, MissingDependencyError

TEMPLATE = Path(__file__).parents[2] / "templates" / "plugin"


class Kind(StrEnum):
    """What the package brings."""

    EVICTION = "eviction"
    PREFETCH = "prefetch"
    ARBITRATION = "arbitration"
    CODEC = "codec"


def new(
    name: Annotated[str, typer.Argument(help="Such as my-policy; the package: fluxmoe-my-policy.")],
    kind: Annotated[Kind, typer.Option(help="What it brings.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to; by default ./fluxmoe-NAME.")
    ] = None,
) -> None:
    """Begin a package: a policy or codec of a few lines, tests that call the conformance kit."""
    import fluxmoe
    from fluxmoe import plugins

    short = name.removeprefix("fluxmoe-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short):
        raise ConfigError(
            f"{name!r} is no name for a package",
            where="NAME",
            fix="write it in lower-case letters and digits with hyphens, like my-policy",
        )
    known = {(r.kind, r.name): r.plugin for r in plugins.load().everything()}
    if plugin := known.get((kind.value, short)):
        raise ConfigError(
            f"{plugin} has the {kind.value} {short!r} already",
            where="NAME",
            fix="take another one",
        )
    folder = output or Path(f"fluxmoe-{short}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is there already", where="--output", fix="name a folder that is not"
        )
    try:
        import copier
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is needed to begin a package", fix="pip install 'fluxmoe[plugin]'"
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
    what = "codec" if kind is Kind.CODEC else f"{kind.value} policy"
    print(f"{folder}: a package fluxmoe-{short} with the {what} {short!r}")
    print(f"  pip install -e '{folder}[test]' && pytest {folder}")
    print(f"  fluxmoe plugin check {folder / module}.py")
