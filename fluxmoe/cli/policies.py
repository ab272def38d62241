"""``fluxmoe policies``: which policies are known, and who brought them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe.cli import output

if TYPE_CHECKING:
    from fluxmoe.plugins import Registration


def policies(
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE", help="A .py file or module; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List all policies: built in, installed, and from --plugin."""
    from fluxmoe import plugins

    known = list(plugins.load(plugin or ()))
    if as_json:
        output.print_json([_as_json(registration) for registration in known])
        return
    from rich.table import Table

    table = Table("kind", "name", "plugin", "summary")
    for policy in known:
        name = f"{policy.name} (oracle)" if _is_oracle(policy) else policy.name
        table.add_row(policy.kind, name, policy.plugin, policy.summary)
    output.console().print(table)


def _as_json(policy: Registration) -> dict[str, str | bool]:
    return {
        "kind": policy.kind,
        "name": policy.name,
        "plugin": policy.plugin,
        "oracle": _is_oracle(policy),
        "summary": policy.summary,
    }


def _is_oracle(policy: Registration) -> bool:
    return bool(getattr(policy.factory, "needs_future", False))  # only eviction policies can be
