"""Reads of a tier's pages by read threads, while other threads decode pages that have been read.

A read thread reads the stored bytes of one page into memory: uncoded parts into the slot, and coded
parts into one of a few buffers. The thread that needs the page verifies and decodes it. If decoding
lags behind and no buffer is free, coded parts, which are never longer than the originals, are read
into the slot and moved out before they are decoded. Therefore no thread waits for a buffer.

Read threads and decoding threads share only ``Job`` objects. A thread that needs a page whose read
has not begun makes the read itself, and thus does not depend on any other thread.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from fluxmoe.core.owner import Owner
from fluxmoe.core.transfer.jobs import Job, JobPool, Urgency
from fluxmoe.core.types import Bytes
from fluxmoe.errors import StoreError
from fluxmoe.stores.coding import Coder
from fluxmoe.stores.disk.depth import measured
from fluxmoe.stores.disk.reader import (
    LENGTH,
    RAW_SUM,
    DamagedPageError,
    PageReader,
    Scratch,
    checksum,
    sectors,
)

logger = logging.getLogger("fluxmoe")

#: Maximum size of a tier's buffers for coded pages in bytes.
BUFFERS = 64 << 20


class PageReads:
    """Reads of the pages of one tier, from its page file and from its overlay.

    Args:
        coder: Decodes the pages.
        sizes: Bytes of each part before encoding.

    Attributes:
        depth: Number of read threads; 0 before ``start`` and after ``close``.
    """

    def __init__(self, coder: Coder, sizes: Sequence[int]) -> None:
        self._coder, self._nbytes = coder, sum(map(sectors, sizes))
        self._scratch = Scratch(self._nbytes)
        self._pool: JobPool | None = None
        self._owner = Owner()
        self._rooms: list[Bytes] = []
        self.depth = 0

    def start(self, file: PageReader, depth: int | None) -> None:
        """Start the threads.

        Args:
            file: The file from which most pages will be read.
            depth: Number of threads; None to choose the number by measurement.

        Raises:
            ConfigError: This many threads cannot be started.
        """
        self.depth = measured(file) if depth is None else depth
        self._pool = JobPool(self.depth, "read", where="stores.depth")
        count = min(self.depth + 2, BUFFERS // self._nbytes)
        self._rooms = [Scratch(self._nbytes).memory for _ in range(count)]

    def close(self) -> None:
        """Finish the reads that have begun, then stop the threads. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        self._rooms.clear()
        self.depth = 0

    def ahead(self, file: PageReader, page: int, parts: Sequence[Bytes]) -> PageRead | None:
        """Prepare a read by a read thread.

        Returns:
            The read; None if there are no read threads (as in a forked child), or if the page is in
            the page cache: copying a small page takes less time than waking a thread.
        """
        if self._pool is None or not self._owner.here or file.cached(page):
            return None
        return PageRead(self, self._pool, file, page, parts)

    def read(self, file: PageReader, page: int, parts: Sequence[Bytes]) -> None:
        """Read and decode a page in the calling thread; if that fails, retry once.

        Raises:
            StoreError: The second attempt failed as well. If the page is damaged, its file has
                been set aside.
        """
        try:
            self._read(file, page, parts)
        except StoreError as error:
            self.retry(file, page, parts, error)

    def retry(self, file: PageReader, page: int, parts: Sequence[Bytes], error: StoreError) -> None:
        """Log an error and read the page again. See ``read``."""
        logger.warning("a read failed, retrying once: %s", error)
        try:
            self._read(file, page, parts)
        except DamagedPageError:
            file.set_aside()
            raise

    def _read(self, file: PageReader, page: int, parts: Sequence[Bytes]) -> None:
        targets = self.fetch(file, page, parts, self._scratch.memory)
        self.decode(file, page, parts, targets)

    def borrow(self) -> Bytes | None:
        """Take a free buffer for stored bytes, if any; ``give_back`` returns the buffer."""
        with suppress(IndexError):
            return self._rooms.pop()
        return None

    def give_back(self, room: Bytes) -> None:
        self._rooms.append(room)

    def fetch(
        self, file: PageReader, page: int, parts: Sequence[Bytes], room: Bytes | None
    ) -> list[Bytes]:
        """Read a page in stored form.

        Args:
            file: The file that contains the page.
            page: Number of the page.
            parts: Memory for the decoded parts, uint8 ``[part bytes]`` each. Parts that are stored
                uncoded are read directly into this memory.
            room: Memory for coded parts; None to read the coded parts into ``parts`` as well.

        Returns:
            The memory of each part in stored form.
        """
        targets = []
        for out, length in zip(parts, file.index[page, :, LENGTH].tolist(), strict=True):
            if length == len(out):
                targets.append(out)
            elif room is None:
                targets.append(out[:length])
            else:
                targets.append(room[:length])
                room = room[sectors(length) :]
        file.fetch(page, targets)
        return targets

    def decode(
        self,
        file: PageReader,
        page: int,
        parts: Sequence[Bytes],
        targets: Sequence[Bytes],
        *,
        moved: bool = False,
    ) -> None:
        """Verify the stored parts that ``fetch`` has read, and decode the coded parts.

        Args:
            file, page, parts: As for ``fetch``.
            targets: Result of ``fetch``.
            moved: True if coded parts are in ``parts`` and must be moved out before decoding.

        Raises:
            StoreError: The page is damaged or cannot be decoded.
        """
        file.verify(page, targets)
        for part, (out, target) in enumerate(zip(parts, targets, strict=True)):
            if len(target) == len(out):
                continue
            kept = target
            if moved:
                kept = self._scratch.memory[: len(target)]
                np.copyto(kept, target)
            self._coder.decode(kept, out)
            expected = int(file.index[page, part, RAW_SUM])
            if not file.verified[page] and checksum(out) != expected:
                raise DamagedPageError(
                    f"part {part} of page {page} is not what was encoded", where=str(file.path)
                )
        file.verified[page] = True


class PageRead:
    """The read of one page by a read thread. See ``Read``."""

    def __init__(
        self,
        reads: PageReads,
        pool: JobPool,
        file: PageReader,
        page: int,
        parts: Sequence[Bytes],
    ) -> None:
        self._reads, self._pool = reads, pool
        self._page = file, page, parts
        self._job = Job(self._fetch)
        self._room: Bytes | None = None
        self._targets: list[Bytes] | None = None

    def begin(self, urgency: Urgency) -> None:
        self._pool.order(self._job, urgency)

    def withdraw(self) -> bool:
        return self._job.withdraw()

    def finish(self) -> None:
        if self._job.withdraw():
            self._reads.read(*self._page)
            return
        error = self._job.error()
        targets, self._targets = self._targets, None
        try:
            if error is not None:
                raise error
            if targets is None:  # an interrupted call may have left the page incomplete
                self._reads.read(*self._page)
            else:
                self._reads.decode(*self._page, targets, moved=self._room is None)
        except StoreError as error:
            self._reads.retry(*self._page, error)
        finally:
            self._let_go()

    def settle(self) -> None:
        if not self._job.withdraw():
            self._job.error()
        self._let_go()

    def _fetch(self) -> None:
        file, page, parts = self._page
        if (file.index[page, :, LENGTH] != [len(part) for part in parts]).any():
            self._room = self._reads.borrow()
        self._targets = self._reads.fetch(file, page, parts, self._room)

    def _let_go(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            self._reads.give_back(room)
