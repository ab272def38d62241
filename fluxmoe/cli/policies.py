"""``fluxmoe policies``: which policies are known, who brought them, and what is broken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe.cli import output

if TYPE_CHECKING:
    from fluxmoe.plugins import Plugin, Registration

Faults = Mapping[tuple[str, str], int]

_FAULTS = re.compile(
    r"^fluxmoe_policy_faults_total\{(?P<labels>[^}]*)\} (?P<count>[\d.e+]+)", re.MULTILINE
)


def policies(
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE", help="A .py file or module; repeatable."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask a running server which policies have failed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List all policies: built in, installed, and from --plugin; and plugins that are broken."""
    from fluxmoe import plugins

    registry = plugins.load(plugin or ())
    faults = None if server is None else _faults(server)
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
        "oracle": bool(getattr(policy.factory, "needs_future", False)),  # eviction only
        "summary": policy.summary,
        "faults": None if faults is None else faults.get((policy.kind, policy.name)),
    }


def _without_policy(plugin: Plugin) -> dict[str, Any]:
    """A plugin that has registered nothing, and why."""
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


def _faults(server: str) -> Faults:
    """Contained faults per policy, from a server's metrics.

    Raises:
        ConfigError: It does not answer, or is not served with fluxmoe.
    """
    import urllib.error
    import urllib.request

    from fluxmoe.errors import ConfigError

    url = server.rstrip("/") + "/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{url} does not answer: {error}", where="--server", fix="write http://HOST:PORT"
        ) from error
    faults: dict[tuple[str, str], int] = {}
    for found in _FAULTS.finditer(text):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', found["labels"]))
        key = labels.get("kind", ""), labels.get("policy", "")
        faults[key] = faults.get(key, 0) + int(float(found["count"]))
    if not faults:
        raise ConfigError(
            f"{url} counts no faults of policies",
            where="--server",
            fix="start the server with `fluxmoe serve`",
        )
    return faults
