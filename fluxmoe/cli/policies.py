"""``fluxmoe policies``: list policies with their plugins, and broken plugins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe.cli import output, table
from fluxmoe.cli.options import AsCsv, AsJson, Plugins

if TYPE_CHECKING:
    from fluxmoe.plugins import Plugin, Registration

Faults = Mapping[tuple[str, str], int]


def policies(
    plugin: Plugins = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Also show policy faults of a running server."),
    ] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List all policies: built in, installed, and from --plugin; also broken plugins."""
    from fluxmoe import plugins
    from fluxmoe.observe.snapshot import policy_faults

    registry = plugins.load(plugin or ())
    faults = None if server is None else policy_faults(server)
    brought = {p.name: p for p in registry.plugins if p.status == "ok"}
    rows = [_row(policy, brought[policy.plugin], faults) for policy in registry]
    rows += [_without_policy(p) for p in registry.plugins if p.status != "ok"]
    if output.printed(as_json, as_csv, rows, rows):
        return
    table.show(
        "",
        ["kind", "name", "plugin", "version", "status", "summary"],
        ["faults"] if server is not None else [],
        [_cells(row, faults is not None) for row in rows],
    )


def _cells(row: dict[str, Any], with_faults: bool) -> list[str]:
    name = f"{row['name']} (oracle)" if row["oracle"] else row["name"]
    cells = [row["kind"], name, row["plugin"], row["version"], row["status"]]
    cells.append(row["problem"] or row["summary"])
    if with_faults:
        cells.append(row["faults"])
    return ["" if cell is None else str(cell) for cell in cells]


def _row(policy: Registration, plugin: Plugin, faults: Faults | None) -> dict[str, Any]:
    return {
        "kind": policy.kind,
        "name": policy.name,
        "plugin": policy.plugin,
        "origin": plugin.origin,
        "version": _version(plugin),
        "status": plugin.status,
        "problem": "",
        "oracle": bool(getattr(policy.factory, "needs_future", False)),  # eviction only
        "summary": policy.summary,
        "faults": None if faults is None else faults.get((policy.kind, policy.name)),
    }


def _without_policy(plugin: Plugin) -> dict[str, Any]:
    """Make the row of a plugin that registered nothing, with the reason."""
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
