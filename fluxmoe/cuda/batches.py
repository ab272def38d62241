"""Building blocks of ``streams``: batches of copies, events, and the driver's copy calls."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fluxmoe.cuda.driver import CudaDriver
from fluxmoe.errors import SubstrateError

#: First CUDA version whose driver copies a batch in one call and times events as required here.
_LEAST = 12080


@dataclass(slots=True, eq=False)
class CopyBatch:
    """Copies submitted to a stream together.

    Attributes:
        event: Event recorded after the copies; None after they have completed and been retired.
        fence: Event recorded on the kernels' stream before that stream waits for the copies.
        nbytes: Total bytes.
        buffers: Indices of the page-locked source buffers.
    """

    event: Any = None
    fence: Any = None
    nbytes: int = 0
    buffers: list[int] = field(default_factory=list)


class Transfers:
    """Pieces to copy; pieces that are adjacent in both source and target are merged."""

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


class CopySubmitter:
    """Submitter of copies from the host to a stream, in one call if supported."""

    def __init__(self, cuda: CudaDriver) -> None:
        self._cuda = cuda
        api = cuda.api
        # The call changed in CUDA 13, whose bindings do not find the function in older drivers.
        least = max(_LEAST, api.CUDA_VERSION // 1000 * 1000)
        self.batched = cuda.version >= least
        if self.batched:
            attributes = api.CUmemcpyAttributes()
            order = api.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
            attributes.srcAccessOrder = order
            flag = api.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
            attributes.flags = int(flag)
            self._attributes = [attributes]

    def copy(self, transfers: Transfers, stream: Any) -> None:
        count = len(transfers.sizes)
        if self.batched and count > 1:
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


class EventPool:
    """A pool of reusable events."""

    def __init__(self, cuda: CudaDriver) -> None:
        self._cuda = cuda
        self._made: list[Any] = []
        self._free: list[Any] = []

    def record(self, stream: Any) -> Any:
        """Record an event on ``stream``, after all work submitted so far, and return it."""
        if not self._free:
            event = self._cuda.call("cuEventCreate", 0)  # 0: with timing, to measure stalls
            self._made.append(event)
            self._free.append(event)
        self._cuda.call("cuEventRecord", self._free[-1], stream)
        return self._free.pop()

    def wait(self, stream: Any, event: Any) -> None:
        """Make ``stream`` wait for an event; if the driver call fails, wait on the CPU."""
        try:
            self._cuda.call("cuStreamWaitEvent", stream, event, 0)
        except SubstrateError:
            self._cuda.call("cuEventSynchronize", event)

    def passed(self, event: Any) -> bool:
        return self._cuda.ready("cuEventQuery", event)

    def seconds(self, first: Any, then: Any) -> float:
        """Return the seconds from ``first`` to ``then``, which must have passed.

        The result is 0 if ``then`` passed first, or if the time cannot be measured.
        """
        if first is None or self._cuda.version < _LEAST or not self.passed(first):
            return 0.0
        milliseconds: float = self._cuda.call("cuEventElapsedTime", first, then)
        return max(0.0, milliseconds / 1000)

    def free(self, event: Any) -> None:
        """Return an event to the pool. Submitted waits stay valid; new waits are not allowed."""
        if event is not None:
            self._free.append(event)

    def close(self) -> None:
        """Destroy all events, including those in use."""
        with ExitStack() as each:  # runs all callbacks even if one fails
            for event in self._made:
                each.callback(self._cuda.call, "cuEventDestroy", event)
        self._made, self._free = [], []
