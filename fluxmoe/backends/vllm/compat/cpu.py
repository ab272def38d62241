"""vLLM's CPU worker. Only the worker class may import it, when an engine starts.

vLLM's ``v1/worker/cpu/shm.py`` replaces streams, events and page-locking of torch in the process.
"""

from __future__ import annotations

from fluxmoe.backends.vllm.names import NAMES

NAMES.require("cpu")  # an ImportError of the line below would not say what to do

from vllm.v1.worker.cpu_worker import CPUWorker

__all__ = ["CPUWorker"]
