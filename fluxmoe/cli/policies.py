"""``fluxmoe policies``: list known policies with their plugins, and broken plugins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe.cli import output

if TYPE_CHECKING:
    from fluxmoe.plugins import Plugin, Registration

Faults = Mapping[tuple[str, str], int]


def policies(
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE", help="Plugin: .py file or module; repeatable."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Also show policy faults of a running server."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List all policies: built in, installed, and from --plugin; also broken plugins."""
    from fluxmoe import plugins
    from fluxmoe.observe.snapshot import policy_faults

    registry = plugins.load(plugin or ())
    faults = None if server is None else policy_faults(server)
    brought = {p.name: p for p in registry.plugins if p.status == "ok"}
    rows = [_row(policy, brought[policy.plugin], faults) for policy in registry]
    rows += [_without_policy(p) for p in registry.plugins if p.status != "ok"]
    if as_json:
        output.print_json(rows)
        return
    from rich.table import Table

    table = Table("kind", "name", "plugin", "version", "status", "summary")
    if server is not None:
        table.add_column("faults", justify="right")
    for row in rows:
        name = f"{row['name']} (oracle)" if row["oracle"] else row["name"]
        cells = [row["kind"], name, row["plugin"], row["version"], row["status"]]
        cells.append(row["problem"] or row["summary"])
        if server is not None:
            cells.append("" if row["faults"] is None else str(row["faults"]))
        table.add_row(*cells)
    output.console().print(table)


def _row(policy: Registration, plugin: Plugin, faults: Faults | None) -> dict[str, Any]:
    return {
        "kind": policy.kind,
        "name": policy.name,
        "plugin": policy.plugin,
        "origin": plugin.origin,
        "version": _version(plugin),
        "status": plugin.status,
        "problem": "",
        "oracle": policy.oracle,
        "summary": policy.summary,
        "faults": None if faults is None else faults.get((policy.kind, policy.name)),
    }


def _without_policy(plugin: Plugin) -> dict[str, Any]:
    """The row of a plugin that registered nothing, with the reason."""
    return {
        "kind": None,
        "name": None,
        "plugin": plugin.name,
        "origin": plugin.origin,
        "version": plugin.version,
        "status": plugin.status,
        "problem": plugin.problem,
        "oracle": False,
        "summary": "",
        "faults": None,
    }


def _version(plugin: Plugin) -> str:
    from fluxmoe import __version__

    return __version__ if plugin.origin == "built in" else plugin.version
