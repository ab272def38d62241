"""Two numbers shared by a worker and the scheduler, which may be another process.

The messages of the KV connector travel with steps, but weights change between steps: the worker
must know that no request is unfinished, and the scheduler that its prefix cache belongs to other
weights.
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Address:
    """A worker's board, for another process of the same user."""

    process: int
    file: int


class Board:
    """Memory without a name, which goes with the last process that has it.

    Args:
        address: A worker's board; None: make one.
    """

    def __init__(self, address: Address | None = None) -> None:
        if address is None:
            fd = os.memfd_create("fluxmoe-board")
            os.ftruncate(fd, 16)
        else:
            fd = os.open(f"/proc/{address.process}/fd/{address.file}", os.O_RDWR)
        weakref.finalize(self, os.close, fd)
        self._numbers = np.frombuffer(mmap.mmap(fd, 16), np.int64)
        #: Where another process finds this board.
        self.address = Address(os.getpid(), fd)

    @property
    def unfinished(self) -> int:
        """Number of requests that the scheduler has; written by the scheduler."""
        return int(self._numbers[0])

    @unfinished.setter
    def unfinished(self, number: int) -> None:
        self._numbers[0] = number

    @property
    def updates(self) -> int:
        """Number of changes of the weights so far; written by the worker."""
        return int(self._numbers[1])

    @updates.setter
    def updates(self, number: int) -> None:
        self._numbers[1] = number
