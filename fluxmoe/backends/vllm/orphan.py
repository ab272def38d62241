"""End of vLLM's engine and worker processes with their parent.

vLLM 0.32 ends them when its server ends in an orderly way. After a SIGKILL of the server (a
container's time limit, the system's out-of-memory killer) they would live on, with all memory.
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

#: Beginnings of the names that vLLM gives the processes it starts.
_THEIRS = ("EngineCore", "VllmWorker")
#: Seconds for an orderly end.
PATIENCE = 10.0

logger = logging.getLogger("fluxmoe")


@cache
def end_with_parent() -> None:
    """End this process with its parent, if vLLM started it.

    A user's own process, with the engine inside, is left alone.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.current_process().name.startswith(_THEIRS):
        threading.Thread(target=_wait, args=(parent,), name="fluxmoe-orphan", daemon=True).start()


def _wait(parent: BaseProcess) -> None:
    parent.join()
    logger.warning("the process that started this one is gone; it ends, too")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)
