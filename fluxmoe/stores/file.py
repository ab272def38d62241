"""Pages in a page file, which is built on the first start and reused on later ones.

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
from fluxmoe.stores.overlay import Overlay
from fluxmoe.stores.pagefile import PageFile
from fluxmoe.stores.pagewriter import PageFileWriter
from fluxmoe.stores.reader import (
    LENGTH,
    OFFSET,
    RAW_SUM,
    DamagedPageError,
    Index,
    PageReader,
    Scratch,
    checksum,
    sectors,
)

logger = logging.getLogger("fluxmoe")


class FileTier:
    """A tier that keeps its pages on disk.

    The file's name is derived from the layout, the codec and the first page. An existing file is
    used as long as every page that is put matches its checksums in the file; at the first mismatch,
    the file is rebuilt.

    Args:
        folder: Folder of the file.
        coder: Encodes the pages.
        limit: Maximum size of the pages in bytes; None if unlimited.
        options: Options of the codec.
        direct: Read pages that are not in the page cache with direct I/O.
    """

    def __init__(
        self,
        geometry: Geometry,
        page_class: PageClass,
        folder: Path,
        coder: Coder,
        limit: int | None,
        *,
        options: Mapping[str, Any] | None = None,
        direct: bool = True,
    ) -> None:
        self._shape = (geometry.num_pages, [part.nbytes for part in page_class.parts])
        self._about = {
            "codec": coder.name,
            # Some codecs need their options to decode. This is the form that JSON returns.
            "options": json.loads(json.dumps(dict(options or {}), default=str)),
            "num_layers": geometry.num_layers,
            "experts_per_layer": geometry.experts_per_layer,
            "parts": [[part.name, part.nbytes] for part in page_class.parts],
        }
        self._folder, self._coder, self._limit, self._direct = folder, coder, limit, direct
        self._path: Path | None = None
        self._file: PageFile | None = None
        self._writer: PageFileWriter | None = None
        self._overlay: Overlay | None = None
        self._staged: dict[int, Index] = {}
        self._growth = 0  # of ``nbytes``, once the staged pages are committed
        self._held: dict[int, int] = {}  # page → bytes, in the order in which pages were put
        self._coded = Scratch(sum(sectors(part.nbytes) for part in page_class.parts))
        self.nbytes = 0

    def put(self, page: int, parts: Sequence[Bytes]) -> bool:
        sums = [checksum(np.ascontiguousarray(part)) for part in parts]
        if self._path is None:
            self._path = self._begin(page, sums)
        kept: list[Bytes] = []
        if self._file is not None and self._has(page, sums):
            nbytes = sum(sectors(int(length)) for length in self._file.index[page, :, LENGTH])
        else:
            kept = [self._coder.encode(np.ascontiguousarray(part)) for part in parts]
            nbytes = sum(sectors(len(part)) for part in kept)
        if self._limit is not None and self.nbytes + nbytes > self._limit:
            return False
        if kept:
            if self._file is not None:
                self._build_anew()
            assert self._writer is not None
            for part, (data, total) in enumerate(zip(kept, sums, strict=True)):
                self._writer.append(page, part, data, total)
        self._held[page] = nbytes
        self.nbytes += nbytes
        return True

    def finish(self) -> None:
        """Complete a new file and make it visible under its name.

        Raises:
            PageFileError: The file cannot be written.
        """
        if self._writer is None or self._path is None:
            return
        if not self._held:  # no page fitted
            self._writer.abandon()
        else:
            self._file = self._writer.finish(direct=self._direct)
        self._writer = None

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        """Read a page; if that fails, retry once.

        Raises:
            StoreError: The second attempt failed as well. If the page is damaged, its file has
                been set aside.
        """
        overlay: PageReader | None = self._overlay
        file = overlay if overlay is not None and overlay.index[page, 0, OFFSET] else self._file
        if file is None:
            raise StoreError(f"page {page} is not in the store")
        try:
            self._read(file, page, parts)
        except StoreError as error:
            logger.warning("a read failed, retrying once: %s", error)
            try:
                self._read(file, page, parts)
            except DamagedPageError:
                file.set_aside()
                raise

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
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        for file in (self._file, self._overlay):
            if file is not None:
                file.close()
        self._file = self._overlay = None
        self.nbytes = 0

    def _begin(self, page: int, sums: list[int]) -> Path:
        contents = json.dumps([self._about, page, sums]).encode()
        path = self._folder / f"{hashlib.sha256(contents).hexdigest()[:16]}.pages"
        if path.exists():
            try:
                self._file = self._open(path)
                return path
            except PageFileError as error:
                logger.warning("%s is rebuilt: %s", path, error)
        self._writer = PageFileWriter(path, self._about, *self._shape)
        return path

    def _open(self, path: Path) -> PageFile:
        return PageFile(path, self._about, *self._shape, direct=self._direct)

    def _has(self, page: int, sums: list[int]) -> bool:
        assert self._file is not None
        entry = self._file.index[page]
        return bool(entry[:, OFFSET].all()) and entry[:, RAW_SUM].tolist() == sums

    def _build_anew(self) -> None:
        """Begin a new file; copy the pages that were already put from the old file."""
        old, self._file = self._file, None
        assert old is not None and self._path is not None
        logger.warning("%s is rebuilt: it contains different pages", self._path)
        try:
            self._writer = PageFileWriter(self._path, self._about, *self._shape)
            for page in self._held:
                entry = old.index[page]
                kept = [np.empty(length, np.uint8) for length in entry[:, LENGTH].tolist()]
                old.read(page, kept)
                for part, data in enumerate(kept):
                    self._writer.append(page, part, data, int(entry[part, RAW_SUM]))
        except DamagedPageError:
            old.set_aside()
            raise
        finally:
            old.close()

    def _read(self, file: PageReader, page: int, parts: Sequence[Bytes]) -> None:
        room, targets = self._coded.memory, []
        for out, length in zip(parts, file.index[page, :, LENGTH].tolist(), strict=True):
            if length == len(out):
                targets.append(out)
            else:
                targets.append(room[:length])
                room = room[sectors(length) :]
        file.read(page, targets)
        for part, (out, target) in enumerate(zip(parts, targets, strict=True)):
            if target is out:
                continue
            self._coder.decode(target, out)
            expected = int(file.index[page, part, RAW_SUM])
            if not file.verified[page] and checksum(out) != expected:
                raise DamagedPageError(
                    f"part {part} of page {page} is not what was encoded", where=str(file.path)
                )
        file.verified[page] = True
