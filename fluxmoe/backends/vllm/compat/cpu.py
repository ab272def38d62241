"""vLLM's CPU worker, to be imported only by the worker class when an engine starts.

The import has side effects: vLLM's ``v1/worker/cpu/shm.py`` replaces torch's streams, events and
page-locking in the process.
"""

from __future__ import annotations

from fluxmoe.backends.vllm.names import NAMES

NAMES.require("cpu")  # the import below would raise an error without a remedy

from vllm.v1.worker.cpu_worker import CPUWorker

__all__ = ["CPUWorker"]
