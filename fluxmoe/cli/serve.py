"""``fluxmoe serve``: start vLLM's OpenAI server from a configuration file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fluxmoe.cli.shared.options import stores


def serve(
    config: Annotated[Path, typer.Argument(help="YAML file; see docs/reference/configuration.md.")],
    store: Annotated[
        str | None,
        typer.Option(
            metavar="host|file|FOLDER",
            help="Replace the stores of the YAML file; see fluxmoe generate --store.",
        ),
    ] = None,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the vLLM command instead of running it.")
    ] = False,
) -> None:
    """Start vLLM's OpenAI server with paged experts."""
    from fluxmoe import config as configuration
    from fluxmoe import plugins
    from fluxmoe.backends.vllm.preflight import checks
    from fluxmoe.backends.vllm.server import launch
    from fluxmoe.findings import Findings

    changes = {} if store is None else {"stores": stores(store, Path.cwd())}
    if print_command:
        loaded = configuration.load(config, **changes)
        plugins.load(loaded.plugins).check(loaded)
        print(launch.shell_line(checks.resolved(loaded)))
        return
    found = Findings()
    given = configuration.load_most(config, found, **changes)
    ready = given and checks.examine(given, os.environ, found, start="server")
    found.require()
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    assert isinstance(ready, configuration.Resolved)  # otherwise an error was found
    launch.serve(ready)
