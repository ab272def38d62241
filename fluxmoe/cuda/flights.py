"""What ``streams`` is made of: flights, the events that follow them, and the driver's copies."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fluxmoe.cuda.driver import Cuda
from fluxmoe.errors import SubstrateError

#: The first CUDA whose driver takes a batch of copies in one call, and has the present way to time.
_LEAST = 12080


@dataclass(slots=True, eq=False)
class Flight:
    """Copies that were given to a stream together.

    Attributes:
        event: What the stream passes after them; None when they have arrived and been forgotten.
        mark: What the kernels' stream passes before it waits for them.
        nbytes: Of all of them.
        buffers: Page-locked buffers that they read.
    """

    event: Any = None
    mark: Any = None
    nbytes: int = 0
    buffers: list[int] = field(default_factory=list)


class Transfers:
    """Pieces to be copied; what adjoins at both ends is one piece."""

    def __init__(self) -> None:
        self.targets: list[int] = []
        self.sources: list[int] = []
        self.sizes: list[int] = []

    def add(self, target: int, source: int, nbytes: int) -> None:
        if self.sizes:
            size = self.sizes[-1]
            if (self.targets[-1] + size, self.sources[-1] + size) == (target, source):
                self.sizes[-1] += nbytes
                return
        self.targets.append(target)
        self.sources.append(source)
        self.sizes.append(nbytes)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


class Copier:
    """Gives copies from the host to a stream: in one call where the driver can, else one by one."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        api = cuda.api
        # The call has changed with CUDA 13: bindings for it find nothing in an older driver.
        least = max(_LEAST, api.CUDA_VERSION // 1000 * 1000)
        self.batches = cuda.version >= least
        if self.batches:
            attributes = api.CUmemcpyAttributes()
            order = api.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
            attributes.srcAccessOrder = order
            flag = api.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
            attributes.flags = int(flag)
            self._attributes = [attributes]

    def copy(self, transfers: Transfers, stream: Any) -> None:
        count = len(transfers.sizes)
        if self.batches and count > 1:
            pointer = self._cuda.api.CUdeviceptr
            self._cuda.call(
                "cuMemcpyBatchAsync",
                [pointer(target) for target in transfers.targets],
                [pointer(source) for source in transfers.sources],
                transfers.sizes,
                count,
                self._attributes,
                [0],
                1,
                stream,
            )
            return
        for target, source, nbytes in zip(
            transfers.targets, transfers.sources, transfers.sizes, strict=True
        ):
            self._cuda.call("cuMemcpyHtoDAsync", target, source, nbytes, stream)


class Events:
    """Events to be used again and again."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._made: list[Any] = []
        self._free: list[Any] = []

    def record(self, stream: Any) -> Any:
        """The event that ``stream`` passes after what it was given so far."""
        if not self._free:
            event = self._cuda.call("cuEventCreate", 0)  # with timing, for the stalls
            self._made.append(event)
            self._free.append(event)
        self._cuda.call("cuEventRecord", self._free[-1], stream)
        return self._free.pop()

    def wait(self, stream: Any, event: Any) -> None:
        """Let ``stream`` wait for an event; if the driver refuses, the processor waits for it."""
        try:
            self._cuda.call("cuStreamWaitEvent", stream, event, 0)
        except SubstrateError:
            self._cuda.call("cuEventSynchronize", event)

    def passed(self, event: Any) -> bool:
        return self._cuda.ready("cuEventQuery", event)

    def seconds(self, first: Any, then: Any) -> float:
        """From ``first`` to ``then``, which has passed; 0 if it was the other way round."""
        if first is None or self._cuda.version < _LEAST or not self.passed(first):
            return 0.0
        milliseconds: float = self._cuda.call("cuEventElapsedTime", first, then)
        return max(0.0, milliseconds / 1000)

    def free(self, event: Any) -> None:
        """Nobody will wait for it again. (Who has been told to wait for it still does.)"""
        if event is not None:
            self._free.append(event)

    def close(self) -> None:
        """Give all of them back, also those in use."""
        with ExitStack() as each:  # goes on if one fails
            for event in self._made:
                each.callback(self._cuda.call, "cuEventDestroy", event)
        self._made, self._free = [], []
