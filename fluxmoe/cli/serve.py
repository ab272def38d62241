"""``fluxmoe serve``: start vLLM's OpenAI server from a configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    config: Annotated[Path, typer.Argument(help="YAML file, see docs/reference/configuration.md.")],
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the vLLM command instead of running it.")
    ] = False,
) -> None:
    """Start vLLM's OpenAI server with paged experts."""
    from fluxmoe import config as configuration
    from fluxmoe import plugins
    from fluxmoe.backends.vllm.server import launch

    loaded = configuration.load(config)
    registry = plugins.load(loaded.plugins)
    if print_command:
        registry.check(loaded)
        print(launch.shell_line(launch.resolved(loaded)))
        return
    ready, found = launch.examine(loaded, registry, os.environ, serving=True)
    found.require()
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    assert isinstance(ready, configuration.Resolved)  # otherwise an error was found
    launch.serve(ready)
