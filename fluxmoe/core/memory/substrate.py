"""Substrates: address space without memory, memory without addresses, and the mapping of both.

One protocol, mirrored one to one by the operating system's calls on a CPU (``host.py``) and by the
driver's on CUDA. Frames are numbered ``0 … count-1`` and exist for the substrate's whole life.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from fluxmoe.core.types import Int64s


class Substrate(Protocol):
    """Physical frames and the calls that put them behind reserved addresses.

    Attributes:
        frame_bytes: Bytes of a frame.
        count: Number of frames.
        device: Where they lie, as DLPack counts devices: kind and number.
    """

    frame_bytes: int
    count: int
    device: tuple[int, int]

    def reserve(self, nbytes: int) -> int:
        """Reserve address space (a multiple of the frame size) and return its start."""

    def unreserve(self, address: int, nbytes: int) -> None:
        """Give a reserved range back; whatever was committed there is unmapped."""

    def commit(self, address: int, frames: Int64s) -> None:
        """Map ``frames`` one after the other at ``address``, which is frame-aligned.

        Raises:
            SubstrateError: The system refused; nothing is mapped.
        """

    def decommit(self, address: int, count: int) -> None:
        """Unmap ``count`` frames at ``address``. Reading there is an error from now on."""

    def release(self, frames: Int64s) -> None:
        """Give the physical memory of unmapped frames back to the system; their number stays."""

    def allocated(self) -> int:
        """Bytes of physical memory that the system has really given for the frames."""

    def close(self) -> None:
        """Release everything. Idempotent."""


def runs(numbers: Int64s, step: int = 1) -> Iterator[tuple[int, int]]:
    """The runs of numbers that are ``step`` apart, as (first, count)."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != step) + 1):
        if len(run):
            yield int(run[0]), len(run)
