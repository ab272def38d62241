"""Two numbers shared by a worker and the scheduler, which may run in another process.

The KV connector sends its messages with steps, but weights change between steps. The worker may
change weights only if no request is unfinished, and the scheduler must then drop its prefix cache,
which belongs to the old weights.
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a worker's board for other processes of the same user."""

    process: int
    file: int


class Board:
    """Shared memory without a name, which is freed when no process uses it any more.

    Args:
        address: Address of a worker's board; None makes a new board.
    """

    def __init__(self, address: Address | None = None) -> None:
        if address is None:
            fd = os.memfd_create("fluxmoe-board")
            os.ftruncate(fd, 16)
        else:
            fd = os.open(f"/proc/{address.process}/fd/{address.file}", os.O_RDWR)
        self._close = weakref.finalize(self, os.close, fd)
        self._numbers = np.frombuffer(mmap.mmap(fd, 16), np.int64)
        #: The address at which another process finds this board.
        self.address = Address(os.getpid(), fd)

    @property
    def unfinished(self) -> int:
        """Number of unfinished requests; written by the scheduler."""
        return int(self._numbers[0])

    @unfinished.setter
    def unfinished(self, number: int) -> None:
        self._numbers[0] = number

    @property
    def updates(self) -> int:
        """Number of changes to the weights so far; written by the worker."""
        return int(self._numbers[1])

    @updates.setter
    def updates(self, number: int) -> None:
        self._numbers[1] = number

    def close(self) -> None:
        """Release the memory. Idempotent.

        The memory would otherwise stay allocated as long as vLLM refers to a stopped engine.
        """
        self._close()
        self._numbers = np.zeros(2, np.int64)
