"""vLLM's API server, run with the signal handlers that its process already has."""

from __future__ import annotations

from typing import Any

from fluxmoe.backends.vllm.names import NAMES

NAMES.require("server")  # the import below would raise an error without a remedy

from vllm.entrypoints.launchers.api_server import entry


def run() -> None:
    """Run the server with the options in ``sys.argv``."""
    entry.run_server = _run_server
    entry.main()


async def _run_server(args: Any) -> None:
    """Do the same as vLLM's ``run_server``, but without its SIGTERM handler.

    The exception that vLLM's handler raises can get lost.
    """
    entry.decorate_logs("APIServer", skip_if_decorated=True)
    address, sock = entry.setup_server(args, reuse_port=False)
    await entry.run_server_worker(address, sock, args)
