"""Substrates: address space without memory, memory without addresses, and the mapping of the two.

The protocol corresponds to calls of the operating system on a CPU (``host.py``) and to calls of the
driver on CUDA. Frames have the numbers ``0 … count - 1`` and exist as long as the substrate does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from fluxmoe.core.types import Int64s


class Substrate(Protocol):
    """Physical frames, and the calls that map them at reserved addresses.

    Attributes:
        frame_bytes: Size in bytes of a frame.
        count: Number of frames.
        device: DLPack device type and device number of the frames.
    """

    frame_bytes: int
    count: int
    device: tuple[int, int]

    def reserve(self, nbytes: int) -> int:
        """Reserve ``nbytes`` of address space, a multiple of the frame size; return its start."""

    def unreserve(self, address: int, nbytes: int, viewed: object | None = None) -> None:
        """Unmap all frames in a reserved range and release the range.

        Args:
            address: Start of the range.
            nbytes: Size of the range in bytes.
            viewed: Object that exists as long as views of the range in host memory exist; None if
                there are no views. The range is released together with this object; until then, all
                bytes of the range are zero.
        """

    def commit(self, address: int, frames: Int64s) -> None:
        """Map ``frames`` consecutively at the frame-aligned ``address``.

        Raises:
            SubstrateError: A system call failed; nothing is mapped.
        """

    def decommit(self, address: int, count: int) -> None:
        """Unmap ``count`` frames at ``address``, which must not be read afterwards."""

    def release(self, frames: Int64s) -> None:
        """Return the physical memory of unmapped frames to the system; the frames stay valid."""

    def allocated(self) -> int:
        """Return the bytes of physical memory that the system has allocated for the frames."""

    def close(self) -> None:
        """Release everything. Idempotent."""


def runs(numbers: Int64s, step: int = 1) -> Iterator[tuple[int, int]]:
    """Yield each run of numbers that are ``step`` apart, as (first, count)."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != step) + 1):
        if len(run):
            yield int(run[0]), len(run)
