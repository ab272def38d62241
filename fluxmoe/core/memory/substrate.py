"""Substrates: address space without memory, memory without addresses, and the mapping of both.

One protocol that maps one to one to the operating system's calls on a CPU (``host.py``) and to the
driver's on CUDA. Frames are numbered ``0 … count-1`` and exist for the substrate's whole life.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from fluxmoe.core.types import Int64s


class Substrate(Protocol):
    """Physical frames and the calls that map them at reserved addresses.

    Attributes:
        frame_bytes: Bytes of a frame.
        count: Number of frames.
        device: DLPack device type and device number of the frames.
    """

    frame_bytes: int
    count: int
    device: tuple[int, int]

    def reserve(self, nbytes: int) -> int:
        """Reserve address space (a multiple of the frame size) and return its start."""

    def unreserve(self, address: int, nbytes: int) -> None:
        """Release a reserved range; any frames mapped there are unmapped."""

    def commit(self, address: int, frames: Int64s) -> None:
        """Map ``frames`` one after the other at ``address``, which is frame-aligned.

        Raises:
            SubstrateError: The system refused; nothing is mapped.
        """

    def decommit(self, address: int, count: int) -> None:
        """Unmap ``count`` frames at ``address``. Reading there is an error afterwards."""

    def release(self, frames: Int64s) -> None:
        """Return the physical memory of unmapped frames to the system; their numbers stay valid."""

    def allocated(self) -> int:
        """Bytes of physical memory that the system has actually allocated for the frames."""

    def close(self) -> None:
        """Release everything. Idempotent."""


def runs(numbers: Int64s, step: int = 1) -> Iterator[tuple[int, int]]:
    """The runs of numbers that are ``step`` apart, as (first, count)."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != step) + 1):
        if len(run):
            yield int(run[0]), len(run)
