"""``fluxmoe serve``: start vLLM's OpenAI server from a configuration."""

from __future__ import annotations

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
    # Raises errors of plugins here instead of in a worker.
    registry = plugins.load(loaded.plugins)
    registry.policies(loaded)
    arbitration = registry.arbitration(loaded)
    resolved = launch.resolved(loaded)
    if print_command:
        print(launch.shell_line(resolved))
    else:
        launch.serve(resolved, moving=resolved.dynamic(arbitration))
