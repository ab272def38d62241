"""Substrates: address space without memory, memory without addresses, and mapping one to the other.

The protocol maps one to one to the operating system's calls on a CPU (``host.py``) and to the
driver's on CUDA. Frames are numbered ``0 … count - 1`` and exist for the substrate's lifetime.
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
        """Reserve ``nbytes``, a multiple of the frame size, of address space; return its start."""

    def unreserve(self, address: int, nbytes: int) -> None:
        """Release a reserved range and unmap any frames there."""

    def commit(self, address: int, frames: Int64s) -> None:
        """Map ``frames`` consecutively at the frame-aligned ``address``.

        Raises:
            SubstrateError: A system call failed; nothing is mapped.
        """

    def decommit(self, address: int, count: int) -> None:
        """Unmap ``count`` frames at ``address``, which must not be read afterwards."""

    def release(self, frames: Int64s) -> None:
        """Return the physical memory of unmapped frames to the system; their numbers stay valid."""

    def allocated(self) -> int:
        """Bytes of physical memory that the system has allocated for the frames."""

    def close(self) -> None:
        """Release everything. Idempotent."""


def runs(numbers: Int64s, step: int = 1) -> Iterator[tuple[int, int]]:
    """Yield runs of numbers that are ``step`` apart, as (first, count)."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != step) + 1):
        if len(run):
            yield int(run[0]), len(run)
