"""A real or fake device on which the conformance tests launch kernels and read memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fluxmoe.core.memory.arena import Arena
from fluxmoe.cuda.driver import CudaDriver
from fluxmoe.cuda.fake import FakeDriver
from fluxmoe.cuda.frames import FRAME_BYTES, CudaSubstrate
from fluxmoe.errors import FluxMoEError

FRAME = FRAME_BYTES


class Card:
    """A device with a stream of kernels."""

    def __init__(self, cuda: CudaDriver, fake: FakeDriver | None = None) -> None:
        self.cuda, self.fake = cuda, fake
        with cuda.current():
            flag = int(cuda.api.CUstream_flags.CU_STREAM_NON_BLOCKING)
            self.kernels = cuda.call("cuStreamCreate", flag)

    def write(self, address: int, data: np.ndarray) -> None:
        data = np.ascontiguousarray(data)
        with self.cuda.current():
            self.cuda.call("cuMemcpyHtoD", address, data.ctypes.data, data.nbytes)

    def read(self, address: int, nbytes: int) -> np.ndarray:
        data = np.empty(nbytes, np.uint8)
        with self.cuda.current():
            self.cuda.call("cuMemcpyDtoH", data.ctypes.data, address, nbytes)
        return data

    def fill(self, address: int, value: int, frames: int = 1) -> None:
        self.write(address, np.full(frames * FRAME, value, np.uint8))

    def firsts(self, address: int, frames: int) -> list[int]:
        """Read the byte in the middle of each frame."""
        middle = FRAME // 2
        return [int(self.read(address + i * FRAME + middle, 1)[0]) for i in range(frames)]

    def copy_when_its_turn_comes(self, target: int, source: int, nbytes: int) -> None:
        """Launch a stand-in for a kernel, which reads one location and writes to another."""
        with self.cuda.current():
            self.cuda.call("cuMemcpyDtoDAsync", target, source, nbytes, self.kernels)

    def keep_busy(self, address: int, nbytes: int, times: int) -> None:
        """Give the kernels' stream work that takes some time."""
        with self.cuda.current():
            for _ in range(times):
                self.cuda.call("cuMemsetD8Async", address, 0, nbytes, self.kernels)

    def finish(self) -> None:
        with self.cuda.current():
            self.cuda.call("cuCtxSynchronize")

    @contextmanager
    def substrate(self, count: int, **options) -> Iterator[CudaSubstrate]:
        substrate = CudaSubstrate(self.cuda, count, FRAME, **options)
        try:
            yield substrate
        finally:
            substrate.close()

    @contextmanager
    def arena(self, frames: int) -> Iterator[Arena]:
        """Make an arena with its own frames, all committed."""
        with self.substrate(frames) as substrate:
            arena = Arena(substrate, frames * FRAME)
            arena.commit(0, np.arange(frames))
            yield arena
            arena.close()

    def close(self) -> None:
        with self.cuda.current():
            self.cuda.call("cuStreamDestroy", self.kernels)
        self.cuda.close()


def fake_card(pace: str) -> Card:
    fake = FakeDriver(64, FRAME, pace=pace)
    return Card(CudaDriver(fake), fake)


def real_card() -> Card | str:
    """Get the first GPU of this machine, or the reason for its absence."""
    try:
        return Card(CudaDriver())
    except FluxMoEError as error:
        return str(error)
