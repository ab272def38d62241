"""Choice of the number of concurrent reads: the smallest number with nearly the maximum rate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from fluxmoe.core.transfer.jobs import Job, JobPool, Urgency
from fluxmoe.stores.disk.reader import LENGTH, PageReader, Scratch, sectors

logger = logging.getLogger("fluxmoe")

#: Depth if it is not measured: without direct I/O, or for files smaller than ``_SMALL`` bytes.
DEPTH = 4
_SMALL = 256 << 20

#: The depths to try, the bytes of one read, and the seconds for each depth and for all depths.
_DEPTHS, _PROBE, _ROUND, _ROUNDS = (1, 2, 4, 8), 1 << 20, 0.05, 0.3


def measured(file: PageReader) -> int:
    """Choose the number of concurrent reads by measuring a file's disk for less than 0.3 s.

    Returns:
        The number; ``DEPTH`` if the file is small or has no direct I/O, or if a read fails.
    """
    lengths = file.index[:, :, LENGTH].sum(1)
    if not file.direct or lengths.sum() < _SMALL:
        return DEPTH
    pages = np.flatnonzero(lengths)
    nbytes = min(_PROBE, int(lengths[pages].min()))
    scratch, random = Scratch(sectors(nbytes)), np.random.default_rng()

    def read() -> int:
        return file.probe(int(random.choice(pages)), scratch.memory)

    try:
        depth, rate = choose(read)
    except OSError as error:  # later reads of the pages report the error
        logger.warning("%s cannot be measured: %s", file.path, error)
        return DEPTH
    logger.info("%s: %d reads at once, %.2f GB/s", file.path, depth, rate / 1e9)
    return depth


def choose(read: Callable[[], int]) -> tuple[int, float]:
    """Find the smallest depth whose rate is within 5 % of the best.

    Args:
        read: Makes one read and returns the number of bytes; called by one thread per concurrent
            read.

    Returns:
        The depth, and its rate in bytes per second.

    Raises:
        OSError: A read failed.
        ConfigError: The threads cannot be started.
    """
    rates: dict[int, float] = {}
    end = time.perf_counter() + _ROUNDS
    for depth in _DEPTHS:
        rates[depth], longest = rate(read, depth)
        # On a busy disk, the reads at the next depth may take twice as long.
        if time.perf_counter() + _ROUND + 2 * longest > end:
            break
    best = max(rates.values())
    return next((depth, rate) for depth, rate in rates.items() if rate >= 0.95 * best)


def rate(read: Callable[[], int], depth: int) -> tuple[float, float]:
    """Measure reads at a depth; return the rate in bytes/s and the longest duration in seconds."""
    done: list[tuple[float, float, int]] = []  # begin, end and bytes of each read
    until = time.perf_counter() + _ROUND

    def work() -> None:
        while (begun := time.perf_counter()) < until:
            nbytes = read()
            done.append((begun, time.perf_counter(), nbytes))

    pool, jobs = JobPool(depth - 1, "read", where="stores.depth"), []
    try:
        for _ in range(depth - 1):
            jobs.append(Job(work))
            pool.order(jobs[-1], Urgency.DEMAND)
        work()
    finally:
        pool.close()
    for error in [job.error() for job in jobs]:
        if error is not None:
            raise error
    # For a read that ends after the deadline, only the share before the deadline counts, so that
    # the depth is constant during the measured time.
    total = sum(n * (min(end, until) - begun) / max(end - begun, 1e-9) for begun, end, n in done)
    return total / _ROUND, max((end - begun for begun, end, _ in done), default=0.0)
