"""The server's process: vLLM's API server, which SIGTERM and Ctrl-C can end even during startup.

vLLM 0.32 itself loses a SIGTERM that arrives during the engine's startup, and handles Ctrl-C only
after the startup.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from types import FrameType

import psutil


def main() -> None:
    """Run the server with the options in ``sys.argv``."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    from fluxmoe.backends.vllm.compat import server  # takes seconds, during which signals must work

    server.run()


def _end(number: int, frame: FrameType | None) -> None:
    """End this process and its children. No request is lost, as the server has not yet started."""
    name = signal.Signals(number).name
    os.write(2, f"fluxmoe: ended by {name} while the server was starting\n".encode())
    for engine in multiprocessing.active_children():
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(engine.pid).children(recursive=True):
                process.kill()
        engine.kill()
    os._exit(128 + number)


if __name__ == "__main__":
    main()
