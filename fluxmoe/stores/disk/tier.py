"""Pages in a page file, which is built on the first start and found by its key on later ones.

Replaced pages are kept in an overlay: the file itself never changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.core.types import Bytes, Geometry, PageClass
from fluxmoe.errors import PageFileError, StoreError
from fluxmoe.stores.coding import Coder
from fluxmoe.stores.disk.key import Key
from fluxmoe.stores.disk.overlay import Overlay
from fluxmoe.stores.disk.pagefile import PageFile
from fluxmoe.stores.disk.pagewriter import PageFileWriter
from fluxmoe.stores.disk.reader import (
    LENGTH,
    OFFSET,
    DiskMeter,
    Index,
    PageReader,
    checksum,
    sectors,
)
from fluxmoe.stores.disk.reads import PageRead, PageReads

logger = logging.getLogger("fluxmoe")


class FileTier:
    """A tier that keeps its pages on disk.

    The file's name is derived from the key of the weights, the layout, the codec and the limits. An
    existing file with this name is used unchanged; pages that it lacks are kept in the overlay.

    Args:
        folder: Folder of the file.
        coder: Encodes the pages.
        limit: Maximum size of the pages in bytes; None if unlimited.
        key: Describes the weights; called before the first page is claimed or put, and again when
            a new file is complete.
        options: Options of the codec.
        beside: Settings of the tiers before this one, which take pages first.
        direct: Read pages that are not in the page cache with direct I/O.
        depth: Number of threads that read pages; None to choose the number by measurement.
    """

    def __init__(
        self,
        geometry: Geometry,
        page_class: PageClass,
        folder: Path,
        coder: Coder,
        limit: int | None,
        *,
        key: Key,
        options: Mapping[str, Any] | None = None,
        beside: Sequence[Mapping[str, Any]] = (),
        direct: bool = True,
        depth: int | None = None,
    ) -> None:
        self._shape = (geometry.num_pages, [part.nbytes for part in page_class.parts])
        about = {
            "codec": coder.name,
            # Some codecs need their options to decode.
            "options": dict(options or {}),
            "num_layers": geometry.num_layers,
            "experts_per_layer": geometry.experts_per_layer,
            "parts": [[part.name, part.nbytes] for part in page_class.parts],
            # With other limits, the file would hold other pages.
            "limit": limit,
            "beside": list(beside),
        }
        self._about: dict[str, Any] = json.loads(json.dumps(about, default=str))
        self._key: Key | None = key  # None after ``finish``, to free the weights
        self._found: object = None  # the key's value before the first page
        self._folder, self._coder, self._limit, self._direct = folder, coder, limit, direct
        self._depth = depth
        self._file: PageFile | None = None
        self._writer: PageFileWriter | None = None
        self._overlay: Overlay | None = None
        self._staged: dict[int, Index] = {}
        self._growth = 0  # of ``nbytes`` when the staged pages are committed
        self._held: dict[int, int] = {}  # page → bytes, in the order in which pages were put
        self._reads = PageReads(coder, self._shape[1])
        self.nbytes = 0

    def claim(self, page: int) -> bool:
        entry = self._opened().index[page]
        if not entry[0, OFFSET]:
            return False
        self._hold(page, sum(sectors(int(length)) for length in entry[:, LENGTH]))
        return True

    def put(self, page: int, parts: Sequence[Bytes]) -> bool:
        self._opened()
        if self._writer is None:
            kept = self.stage(page, parts)
            self.commit()
            return kept
        coded = [self._coder.encode(np.ascontiguousarray(part)) for part in parts]
        nbytes = sum(sectors(len(part)) for part in coded)
        if self._limit is not None and self.nbytes + nbytes > self._limit:
            return False
        sums = [checksum(np.ascontiguousarray(part)) for part in parts]
        self._writer.append(page, coded, sums)
        self._hold(page, nbytes)
        return True

    def finish(self) -> None:
        """Complete a new file, if any, make it visible under its name, and start the read threads.

        Raises:
            PageFileError: The file cannot be written, or the weights changed after the first page.
            ConfigError: The threads cannot be started.
        """
        if self._writer is not None:
            if not self._held:  # no page fitted
                self._writer.abandon()
            elif self._described() != self._found:
                self._writer.abandon()
                raise PageFileError("the weights changed while they were read", fix="start again")
            else:
                self._file = self._writer.finish(direct=self._direct)
            self._writer = None
        self._key = None
        if self._file is not None:
            self._reads.start(self._file, self._depth)

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        """Read a page in the calling thread; if that fails, retry once. See ``PageReads.read``."""
        self._reads.read(self._holder(page), page, parts)

    def ahead(self, page: int, parts: Sequence[Bytes]) -> PageRead | None:
        return self._reads.ahead(self._holder(page), page, parts)

    @property
    def depth(self) -> int:
        """Number of read threads."""
        return self._reads.depth

    @property
    def meters(self) -> list[DiskMeter]:
        """Measurements of the reads from each of the tier's files."""
        return [file.meter for file in (self._file, self._overlay) if file is not None]

    def _holder(self, page: int) -> PageReader:
        """Return the file that has a page's current contents."""
        overlay: PageReader | None = self._overlay
        file = overlay if overlay is not None and overlay.index[page, 0, OFFSET] else self._file
        if file is None:
            raise StoreError(f"page {page} is not in the store")
        return file

    def stage(self, page: int, parts: Sequence[Bytes]) -> bool:
        kept = [self._coder.encode(np.ascontiguousarray(part)) for part in parts]
        growth = self._growth + sum(sectors(len(part)) for part in kept) - self._held.get(page, 0)
        if self._limit is not None and self.nbytes + growth > self._limit:
            return False
        if self._overlay is None:
            self._overlay = Overlay(self._folder, *self._shape, direct=self._direct)
        sums = [checksum(np.ascontiguousarray(part)) for part in parts]
        self._staged[page] = self._overlay.write(page, kept, sums)
        self._growth = growth
        return True

    def commit(self) -> None:
        for page, entry in self._staged.items():
            assert self._overlay is not None
            self._overlay.replace(page, entry)
            self._held[page] = sum(sectors(int(length)) for length in entry[:, LENGTH])
        self.nbytes += self._growth
        self.discard()

    def discard(self) -> None:
        self._staged, self._growth = {}, 0

    def forget(self, page: int) -> None:
        self.nbytes -= self._held.pop(page)

    def close(self) -> None:
        self._reads.close()
        if self._writer is not None:
            self._writer.suspend()  # the next start continues the file
            self._writer = None
        for file in (self._file, self._overlay):
            if file is not None:
                file.close()
        self._file = self._overlay = None
        self.nbytes = 0

    def _hold(self, page: int, nbytes: int) -> None:
        self._held[page] = nbytes
        self.nbytes += nbytes

    def _described(self) -> object:
        """Return the key after a round trip through JSON."""
        assert self._key is not None
        return json.loads(json.dumps(self._key(), default=str))

    def _opened(self) -> PageFile | PageFileWriter:
        """Return the file; the first call opens an existing file or begins a new one."""
        found = self._file or self._writer
        if found is not None:
            return found
        self._found = self._described()
        about = {**self._about, "key": self._found}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = self._folder / f"{name}.pages"
        if path.exists():
            try:
                self._file = PageFile(path, about, *self._shape, direct=self._direct)
                return self._file
            except PageFileError as error:
                logger.warning("%s is rebuilt: %s", path, error)
        self._writer = PageFileWriter(path, about, *self._shape)
        return self._writer
