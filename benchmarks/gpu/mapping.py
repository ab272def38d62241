"""Cost of the driver's virtual memory calls for committing and decommitting frames of 2 MiB.

    python -m benchmarks gpu mapping [--save FILE]

``first`` includes creating the frames, which happens once in their lifetime. ``again`` only maps
existing frames, which is the cost of moving the split.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu import device as gpu

FRAME_BYTES = 2 << 20


def main(argv: list[str]) -> None:
    from fluxmoe.cuda.driver import CudaDriver

    parser = gpu.arguments("mapping", __doc__)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    cuda = CudaDriver()
    rows = [measure(cuda, count, options.repeats) for count in (1, 8, 48, 512)]
    gpu.report(options, "frames of 2 MiB, µs per frame, median", rows)


def measure(cuda: Any, count: int, repeats: int, frame_bytes: int = FRAME_BYTES) -> dict[str, Any]:
    """Measure one row of the table, with ``count`` frames at a time."""
    times = [once(cuda, count, frame_bytes) for _ in range(repeats)]
    middle = [statistics.median(column) / count for column in zip(*times, strict=True)]
    return {"frames": count} | dict(zip(("first", "again", "decommit"), middle, strict=True))


def once(cuda: Any, count: int, frame_bytes: int) -> tuple[float, float, float]:
    """Measure a first commit, a second commit, and a decommit, in µs."""
    from fluxmoe.cuda.frames import CudaSubstrate

    substrate = CudaSubstrate(cuda, count, frame_bytes)
    nbytes, frames = count * frame_bytes, np.arange(count)
    address = substrate.reserve(nbytes)
    first = timed(lambda: substrate.commit(address, frames))
    gone = timed(lambda: substrate.decommit(address, count))
    again = timed(lambda: substrate.commit(address, frames))
    substrate.decommit(address, count)
    substrate.unreserve(address, nbytes)
    substrate.close()
    return first, again, gone


def timed(work: Callable[[], object]) -> float:
    """Time ``work`` in µs."""
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e6
