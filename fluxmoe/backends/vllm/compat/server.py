"""vLLM's API server, run with the existing signal handlers of its process."""

from __future__ import annotations

from typing import Any

from fluxmoe.backends.vllm.names import NAMES

NAMES.require("server")  # an ImportError from the line below would give no remedy

from vllm.entrypoints.launchers.api_server import entry


def run() -> None:
    """Run the server with the options in ``sys.argv``."""
    entry.run_server = _run_server
    entry.main()


async def _run_server(args: Any) -> None:
    """Run like vLLM's ``run_server``, without its SIGTERM handler, whose exception gets lost."""
    entry.decorate_logs("APIServer", skip_if_decorated=True)
    address, sock = entry.setup_server(args, reuse_port=False)
    await entry.run_server_worker(address, sock, args)
