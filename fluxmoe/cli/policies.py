"""``fluxmoe policies``: list all policies and their plugins, including broken plugins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson, Plugins

if TYPE_CHECKING:
    from fluxmoe.observe.snapshot import PolicyState
    from fluxmoe.plugins import Plugin, Registration

#: Kind and name of a policy → the policy's state in a server.
States = Mapping[tuple[str, str], "PolicyState"]


def policies(
    plugin: Plugins = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Also show the state of a running server's policies."),
    ] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List all policies (built in, installed, and from --plugin) and all broken plugins."""
    from fluxmoe import plugins
    from fluxmoe.observe import snapshot

    registry = plugins.load(plugin or ())
    running = () if server is None else snapshot.fetch(server).policies
    states = {(policy.kind, policy.name): policy for policy in running}
    brought = {p.name: p for p in registry.plugins if p.status == "ok"}
    rows = [_row(policy, brought[policy.plugin], states) for policy in registry]
    known = {(policy.kind, policy.name) for policy in registry}
    rows += [_elsewhere(state) for key, state in states.items() if key not in known]
    rows += [_without_policy(p) for p in registry.plugins if p.status != "ok"]
    if output.printed(as_json, as_csv, rows, rows):
        return
    table.show(
        "",
        ["kind", "name", "plugin", "version", "status", "summary"],
        ["faults"] if server is not None else [],
        [_cells(row, server is not None) for row in rows],
    )


def _cells(row: dict[str, Any], with_faults: bool) -> list[str]:
    name = f"{row['name']} (oracle)" if row["oracle"] else row["name"]
    cells = [row["kind"], name, row["plugin"], row["version"], row["status"]]
    cells.append(row["problem"] or row["summary"])
    if with_faults:
        cells.append(row["faults"])
    return ["" if cell is None else str(cell) for cell in cells]


def _row(policy: Registration, plugin: Plugin, states: States) -> dict[str, Any]:
    state = states.get((policy.kind, policy.name))
    replaced = "" if state is None else state.replaced
    return {
        "kind": policy.kind,
        "name": policy.name,
        "plugin": policy.plugin,
        "origin": plugin.origin,
        "version": plugin.version,
        "status": "replaced" if replaced else plugin.status,
        "problem": replaced,
        "oracle": policy.oracle,
        "summary": policy.summary.replace("``", ""),
        "faults": None if state is None else state.faults,
    }


def _elsewhere(state: PolicyState) -> dict[str, Any]:
    """Make the row of a policy that is registered only in the server."""
    return {
        "kind": state.kind,
        "name": state.name,
        "plugin": "",
        "origin": "the server's",
        "version": "",
        "status": "replaced" if state.replaced else "ok",
        "problem": state.replaced,
        "oracle": False,
        "summary": "known to the server only",
        "faults": state.faults,
    }


def _without_policy(plugin: Plugin) -> dict[str, Any]:
    """Make the row of a plugin that is broken or left out, with the reason."""
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
