"""Pages in a page file: built on the first start, verified and reused on later ones.

Replaced pages are in an overlay: the file itself never changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.core.types import Bytes, Geometry, PageClass
from fluxmoe.errors import PageFileError, StoreError
from fluxmoe.stores.coding import Coder
from fluxmoe.stores.overlay import Overlay
from fluxmoe.stores.pagefile import PageFile, PageFileWriter
from fluxmoe.stores.parts import LENGTH, OFFSET, RAW_SUM, SECTOR, Index, checksum, sectors

logger = logging.getLogger("fluxmoe")


class FileTier:
    """Pages on disk.

    The file's name is derived from its layout, its codec and its first page. An existing file is
    used as long as every page put matches its checksum in the file; at the first mismatch it is
    rebuilt.

    Args:
        folder: Folder of the file.
        coder: Encodes the pages.
        limit: Maximum bytes of the pages; None if unlimited.
        options: Options of the codec.
        direct: Read uncached parts with direct I/O.
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
        self._shape = (geometry.num_pages, len(page_class.parts))
        self._page_class = page_class
        self._about = {
            "codec": coder.name,
            # Some codecs need them to decode. Normalised to what JSON returns.
            "options": json.loads(json.dumps(dict(options or {}), default=str)),
            "num_layers": geometry.num_layers,
            "experts_per_layer": geometry.experts_per_layer,
            "parts": [[part.name, part.nbytes] for part in page_class.parts],
        }
        self._folder, self._coder, self._limit, self._direct = folder, coder, limit, direct
        self._largest = max(part.nbytes for part in page_class.parts)
        self._path: Path | None = None
        self._file: PageFile | None = None
        self._writer: PageFileWriter | None = None
        self._overlay: Overlay | None = None
        self._staged: dict[int, Index] = {}
        self._growth = 0  # of nbytes, by the staged pages
        self._held: dict[int, int] = {}  # page → bytes, in the order put
        self._scratch = threading.local()
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
        if not self._held:  # no page fit
            self._writer.abandon()
        else:
            self._writer.finish()
            self._file = self._open(self._path)
        self._writer = None

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        """Read a page; retry once on failure.

        Raises:
            StoreError: The second attempt failed as well.
        """
        try:
            self._read(page, parts)
        except StoreError as error:
            logger.warning("a read failed, retrying once: %s", error)
            self._read(page, parts)

    def stage(self, page: int, parts: Sequence[Bytes]) -> bool:
        kept = [self._coder.encode(np.ascontiguousarray(part)) for part in parts]
        growth = self._growth + sum(sectors(len(part)) for part in kept) - self._held.get(page, 0)
        if self._limit is not None and self.nbytes + growth > self._limit:
            return False
        if self._overlay is None:
            pages, _ = self._shape
            self._overlay = Overlay(self._folder, pages, self._page_class, direct=self._direct)
        sums = [checksum(np.ascontiguousarray(part)) for part in parts]
        self._staged[page] = self._overlay.write(page, kept, sums)
        self._growth = growth
        return True

    def commit(self) -> None:
        for page, entry in self._staged.items():
            assert self._overlay is not None
            self._overlay.index[page] = entry
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
        """Begin a new file with the pages of the old file that were already put."""
        old, self._file = self._file, None
        assert old is not None and self._path is not None
        logger.warning("%s is rebuilt: it contains different pages", self._path)
        try:
            self._writer = PageFileWriter(self._path, self._about, *self._shape)
            for page in self._held:
                for part, (_, length, _, total) in enumerate(old.index[page].tolist()):
                    data = np.empty(length, np.uint8)
                    old.read(page, part, data, self._room(length))
                    self._writer.append(page, part, data, total)
        finally:
            old.close()

    def _read(self, page: int, parts: Sequence[Bytes]) -> None:
        file: PageFile | Overlay | None = self._file
        if self._overlay is not None and self._overlay.holds(page):
            file = self._overlay
        if file is None:
            raise StoreError(f"page {page} is not in the store")
        for part, out in enumerate(parts):
            length = int(file.index[page, part, LENGTH])
            room = self._room(length)
            if length == len(out):
                file.read(page, part, out, room)
            else:
                kept = room[sectors(length) :][:length]
                file.read(page, part, kept, room)
                self._coder.decode(kept, out)

    def _room(self, nbytes: int) -> Bytes:
        """This thread's scratch memory: twice a part in whole sectors, aligned to a sector."""
        room: Bytes | None = getattr(self._scratch, "room", None)
        if room is None:
            memory = mmap.mmap(-1, 2 * sectors(self._largest) + SECTOR)
            room = self._scratch.room = np.frombuffer(memory, np.uint8)
        return room
