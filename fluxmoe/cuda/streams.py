"""The class ``StreamCopier``, which copies pages into a CUDA device's slots on two streams.

The engine's thread submits copies to a stream and continues. The *urgent* stream takes demands and
moves; the *behind* stream takes prefetches. Before a slot is written, the copying stream waits for
the kernels submitted so far, which may read the slot's old page; before the next kernel, the
kernels' stream waits for the pages that the kernel needs. These waits take place on the device, by
means of CUDA events. The CPU waits only if too much is in flight. A step whose pages have all
arrived makes no driver calls.

A device's copy engine processes copies in the order of submission, regardless of stream priorities,
so a demand waits for the prefetches submitted before it. Therefore only a few prefetched bytes are
submitted at a time; the other prefetches wait here, where they can still be cancelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from fluxmoe.core.memory.dlpack import Exported
from fluxmoe.core.transfer.engine import PendingCopy
from fluxmoe.core.transfer.store import Store
from fluxmoe.core.types import Loads
from fluxmoe.cuda.batches import CopyBatch, CopySubmitter, EventPool, Transfers
from fluxmoe.cuda.driver import CudaDriver, no_range
from fluxmoe.cuda.pinned import PageSource
from fluxmoe.errors import InvariantError, StoreError, SubstrateError

#: Maximum bytes of prefetches in flight at a time; PCIe 5 transfers them in about a millisecond.
AHEAD_BYTES = 64 << 20
#: Maximum number of demands in flight; at this number, the CPU waits for the oldest.
MOST_DEMANDS = 64


class StreamedCopy:
    """A prefetch that is waiting, submitted to the device, failed or cancelled."""

    def __init__(self, copier: StreamCopier, bank: int, page: int, slot: int) -> None:
        self._copier = copier
        self.bank, self.page, self.slot = bank, page, slot
        self.batch: CopyBatch | None = None
        self.failed: Exception | None = None
        self.withdrawn = False

    def withdraw(self) -> bool:
        self.withdrawn = self.batch is None and self.failed is None
        return self.withdrawn

    def error(self) -> Exception | None:
        if self.batch is not None:
            self._copier.follow(self.batch)
        return self.failed


class StreamCopier:
    """Copier of pages on streams. Implements ``Copier``; called only on the engine's thread.

    Args:
        cuda: The device; not closed with the copier.
        store: Source of the pages. Pages of an ``AddressedStore`` are copied directly to the
            device; other pages pass through page-locked buffers, which the caller's thread fills.
        slots: The arena ``[slots, part bytes]`` of each bank and part.
        kernels: Function that returns the stream of the next kernel; by default, CUDA's default
            stream.
        ahead: Maximum bytes of prefetches in flight at a time; one page is always allowed.
        ranges: Function that makes profiler ranges, such as ``nvtx.annotate``.

    Raises:
        SubstrateError: The driver could not provide streams, events or page-locked memory.
    """

    def __init__(
        self,
        cuda: CudaDriver,
        store: Store,
        slots: Sequence[Sequence[Exported]],
        *,
        kernels: Callable[[], int] = lambda: 0,
        ahead: int = AHEAD_BYTES,
        ranges: Callable[[str], Any] = no_range,
    ) -> None:
        self._cuda = cuda
        self._slots = [[(part.address, part.nbytes) for part in parts] for parts in slots]
        self._kernels, self._ahead, self._range = kernels, ahead, ranges
        self.stall_seconds = 0.0
        self._orders: deque[tuple[Any, StreamedCopy]] = deque()
        self._demands: deque[CopyBatch] = deque()
        self._prefetches: deque[CopyBatch] = deque()
        with cuda.current(), ExitStack() as undo:
            flag = int(cuda.api.CUstream_flags.CU_STREAM_NON_BLOCKING)
            least, greatest = cuda.call("cuCtxGetStreamPriorityRange")
            self._events = EventPool(cuda)
            undo.callback(self._events.close)
            self._source = PageSource(cuda, store, [part.nbytes for part in slots[0]])
            undo.callback(self._source.close)
            self._submitter = CopySubmitter(cuda)
            self._urgent = self._stream(undo, flag, greatest)
            self._behind = self._stream(undo, flag, least)
            self._end = undo.pop_all()
        self._open = True

    def _stream(self, undo: ExitStack, flag: int, priority: int) -> Any:
        stream = self._cuda.call("cuStreamCreateWithPriority", flag, priority)
        undo.callback(self._cuda.call, "cuStreamDestroy", stream)
        undo.callback(self._cuda.call, "cuStreamSynchronize", stream)  # runs before the destroy
        return stream

    # --- the copier -----------------------------------------------------------------------------

    def demand(self, loads: Loads) -> None:
        with self._driving(f"demand {len(loads)} pages"):
            fence = self._fenced(self._urgent)
            try:
                rest = loads.pairs
                while rest:
                    while len(self._demands) >= MOST_DEMANDS or not self._source.room:
                        self._wait_for_one()
                    now, rest = rest[: self._source.room], rest[self._source.room :]
                    batch = self._send(self._urgent, loads.bank, now)
                    batch.fence, fence = fence, None
                    self._demands.append(batch)
                    self._events.wait(self._kernels(), batch.event)
            finally:
                self._events.free(fence)
            self._pump()

    def prefetch(self, loads: Loads) -> Sequence[StreamedCopy]:
        copies = [StreamedCopy(self, loads.bank, page, slot) for page, slot in loads.pairs]
        # Errors are suppressed here: they will recur, and be raised, when the pages are needed.
        with suppress(StoreError), self._driving(f"prefetch {len(loads)} pages"):
            self._pump()  # earlier orders need not wait for kernels submitted since then
            fence = self._events.record(self._kernels())
            for copy in copies:
                self._orders.append((fence, copy))
                fence = None
            self._pump()
        return copies

    def arrive(self, copy: PendingCopy) -> Exception | None:
        if not isinstance(copy, StreamedCopy):
            raise InvariantError(f"a copy that belongs to another copier: {copy!r}")
        batch = copy.batch
        if batch is None:
            return copy.failed
        if batch.fence is not None or (batch.event is None and not self._orders):
            return None  # the kernels already wait for the batch, or it has completed
        with self._driving("arrive"):
            if batch.event is not None:
                fence = self._events.record(self._kernels())
                self._events.wait(self._kernels(), batch.event)
                batch.fence = fence
            self._pump()
        return None

    def follow(self, batch: CopyBatch) -> None:
        """Make all later work on the urgent stream wait for ``batch``."""
        if batch.event is not None:
            with self._driving("settle"):
                self._events.wait(self._urgent, batch.event)

    def move(self, bank: int, source: int, target: int) -> None:
        with self._driving("move"):
            self._events.free(self._fenced(self._urgent))
            while len(self._demands) >= MOST_DEMANDS:
                self._wait_for_one()
            batch = CopyBatch()
            with self._undone(self._urgent, batch):
                for first, nbytes in self._slots[bank]:
                    to, of = first + target * nbytes, first + source * nbytes
                    self._cuda.call("cuMemcpyDtoDAsync", to, of, nbytes, self._urgent)
                batch.event = self._events.record(self._urgent)
            self._demands.append(batch)
            self._events.wait(self._kernels(), batch.event)

    def close(self) -> None:
        if self._open:
            self._orders.clear()
            with self._cuda.current():
                self._open = False
                self._end.close()

    # --- the streams -----------------------------------------------------------------------------

    def _fenced(self, stream: Any) -> Any:
        """Make a stream wait for all kernels submitted so far; return the event after them."""
        fence = self._events.record(self._kernels())
        self._events.wait(stream, fence)
        return fence

    def _send(self, stream: Any, bank: int, pairs: Sequence[tuple[int, int]]) -> CopyBatch:
        """Submit copies of pages to a stream, followed by an event."""
        batch, transfers = CopyBatch(), Transfers()
        with self._undone(stream, batch):
            places = [self._source.fetch(page, batch) for page, _ in pairs]
            for part, (first, nbytes) in enumerate(self._slots[bank]):
                for (_, slot), place in zip(pairs, places, strict=True):
                    transfers.add(first + slot * nbytes, place[part], nbytes)
            batch.nbytes = transfers.nbytes
            self._submitter.copy(transfers, stream)
            batch.event = self._events.record(stream)
        return batch

    @contextmanager
    def _undone(self, stream: Any, batch: CopyBatch) -> Iterator[None]:
        """Return a context that waits for a partly submitted batch if an exception is raised."""
        try:
            yield
        except BaseException:
            try:
                self._cuda.call("cuStreamSynchronize", stream)
            finally:
                self._source.give_back(batch)
            raise

    def _pump(self) -> None:
        """Retire completed batches and submit as many prefetches as may be in flight."""
        self._retire(self._demands)
        self._retire(self._prefetches)
        while self._orders and self._source.room:
            under_way = sum(batch.nbytes for batch in self._prefetches)
            copies = self._next(self._ahead - under_way)
            if not copies:
                return
            self._give(copies)

    def _next(self, room: int) -> list[StreamedCopy]:
        """Take the next prefetches of one bank that fit, at least one if none is in flight."""
        page_bytes = self._source.page_bytes
        most = min(self._source.room, max(room // page_bytes, not self._prefetches))
        copies: list[StreamedCopy] = []
        while self._orders and len(copies) < most:
            fence, copy = self._orders[0]
            if fence is not None:
                self._events.wait(self._behind, fence)
                self._events.free(fence)
                self._orders[0] = None, copy
            if copies and copy.bank != copies[0].bank:
                break
            self._orders.popleft()
            if not copy.withdrawn:
                copies.append(copy)
        return copies

    def _give(self, copies: list[StreamedCopy]) -> None:
        """Submit prefetches in one batch; on failure, singly, so that only a faulty one fails."""
        try:
            pairs = [(copy.page, copy.slot) for copy in copies]
            batch = self._send(self._behind, copies[0].bank, pairs)
        except (StoreError, SubstrateError) as error:
            if len(copies) == 1:
                copies[0].failed = error
                return
            for copy in copies:
                self._give([copy])
            return
        for copy in copies:
            copy.batch = batch
        self._prefetches.append(batch)

    def _retire(self, batches: deque[CopyBatch]) -> None:
        while batches and self._events.passed(batches[0].event):
            batch = batches.popleft()
            self._source.give_back(batch)
            self.stall_seconds += self._events.seconds(batch.fence, batch.event)
            self._events.free(batch.fence)
            self._events.free(batch.event)
            batch.event = batch.fence = None

    def _wait_for_one(self) -> None:
        """Wait for the oldest batch, to limit the number of batches in flight."""
        batches = self._demands or self._prefetches
        self._cuda.call("cuEventSynchronize", batches[0].event)
        self._retire(batches)

    @contextmanager
    def _driving(self, what: str) -> Iterator[None]:
        try:
            with self._cuda.current(), self._range(f"fluxmoe: {what}"):
                yield
        except SubstrateError as error:
            raise StoreError(
                f"pages cannot be copied to the device: {error.what}",
                where=error.where,
                fix=error.fix,
            ) from error
