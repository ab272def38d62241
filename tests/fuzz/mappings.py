"""Comparison of the operating system's mappings with the books."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fluxmoe.core.memory.arena import ABSENT, Arena
from tests.core.rig import FRAME, FakeCuda


def assert_mapped(arenas: Iterable[Arena], gpu: FakeCuda | None = None) -> None:
    """Assert that exactly the committed positions of each arena map a frame, each its own."""
    mapped = _frames_by_address() if gpu is None else _frames_of_a_gpu(gpu)
    for arena in arenas:
        addresses = arena.address + np.arange(len(arena.frame_at)) * FRAME
        assert [mapped.get(address, ABSENT) for address in addresses.tolist()] == list(
            arena.frame_at
        )


def _frames_of_a_gpu(gpu: FakeCuda) -> dict[int, int]:
    """Get the driver's mappings, except those that failed to unmap."""
    handles = enumerate(gpu._handles)
    frames = {int(handle): frame for frame, handle in handles if handle is not None}
    places = {at: gpu.fake.handle_at(at) for at in gpu.fake._maps if at not in gpu._stale}
    return {at: frames[handle] for at, handle in places.items()}


def _frames_by_address() -> dict[int, int]:
    """Map addresses to the frames mapped there, for all frames of this process."""
    frames = {}
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "/memfd:fluxmoe-frames" not in line:
                continue
            span, _, offset, *_ = line.split()
            first, last = (int(end, 16) for end in span.split("-"))
            for address in range(first, last, FRAME):
                frames[address] = (int(offset, 16) + address - first) // FRAME
    return frames
