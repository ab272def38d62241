"""Measurement of a disk, for predictions before a page file exists."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fluxmoe import machine
from fluxmoe.errors import ConfigError
from fluxmoe.stores.disk.depth import choose, rate
from fluxmoe.stores.disk.reader import SECTOR, Scratch, sectors

#: Bytes of the temporary file, bytes written at once, and number of measurements.
_FILE, _BLOCK, _REPEATS = 256 << 20, 8 << 20, 5


class DiskSpeed(NamedTuple):
    """Speed of random reads of whole pages with direct I/O.

    Attributes:
        nbytes_per_s: Rate of several reads at once, at the best depth.
        seconds: Latency: the duration of a single read minus the time for its bytes at this rate.
        depth: Number of reads at once.
    """

    nbytes_per_s: float
    seconds: float
    depth: int


def measure(folder: Path, page_bytes: int) -> DiskSpeed:
    """Measure the disk of a folder with a temporary file, in a few seconds.

    Args:
        folder: Folder of the page file; if it does not exist, its nearest existing parent is used.
        page_bytes: Size of a read.

    Raises:
        ConfigError: The file cannot be written, or the file system has no direct I/O.
    """
    there, nbytes = machine.existing(folder.absolute()), min(sectors(page_bytes), _FILE // 4)
    try:
        with tempfile.TemporaryFile(dir=there, prefix="fluxmoe-speed-") as file:
            for _ in range(_FILE // _BLOCK):  # random data, because some disks compress
                file.write(os.urandom(_BLOCK))
            file.flush()
            os.fsync(file.fileno())
            return _measure(file.fileno(), nbytes)
    except OSError as error:
        raise ConfigError(
            f"the disk cannot be measured: {error.strerror or error}",
            where=str(folder),
            fix="give a folder on a local disk with 256 MiB free, or replace --store by --hardware",
        ) from error


def _measure(fd: int, nbytes: int) -> DiskSpeed:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    scratch, random = Scratch(nbytes), np.random.default_rng()
    places = (_FILE - nbytes) // SECTOR + 1

    def read() -> int:
        return os.preadv(direct, [scratch.memory.data], int(random.integers(places)) * SECTOR)

    try:
        alone = statistics.median(rate(read, 1)[0] for _ in range(_REPEATS))
        found = sorted((choose(read) for _ in range(_REPEATS)), key=lambda each: each[1])
        depth, best = found[_REPEATS // 2]
    finally:
        os.close(direct)
    return DiskSpeed(best, max(nbytes / alone - nbytes / best, 0.0), depth)
