"""Termination of vLLM's engine and worker processes together with their parent.

vLLM 0.32 ends these processes when its server exits in an orderly way. If the server is killed by
SIGKILL (at a container's time limit, or by the out-of-memory killer), the processes would
otherwise survive and keep all their memory.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from functools import cache
from multiprocessing.process import BaseProcess

#: Prefixes of the names of processes started by vLLM.
_THEIRS = ("EngineCore", "VllmWorker")
#: Seconds for an orderly exit.
PATIENCE = 10.0

logger = logging.getLogger("fluxmoe")


@cache
def end_with_parent() -> None:
    """End this process together with its parent, if vLLM started this process.

    A user's process with an engine inside is not affected.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.current_process().name.startswith(_THEIRS):
        threading.Thread(target=_wait, args=(parent,), name="fluxmoe-orphan", daemon=True).start()


def _wait(parent: BaseProcess) -> None:
    parent.join()
    logger.warning("the parent process has ended; ending this process as well")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)
