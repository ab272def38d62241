"""What the operating system says is mapped, against what the books say."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fluxmoe.core.arena import ABSENT, Arena
from tests.core.rig import FRAME


def assert_mapped(arenas: Iterable[Arena]) -> None:
    """Every committed position of every arena maps its own frame, and no other position does."""
    mapped = _frames_by_address()
    for arena in arenas:
        addresses = arena.address + np.arange(len(arena.frame_at)) * FRAME
        assert [mapped.get(address, ABSENT) for address in addresses.tolist()] == list(
            arena.frame_at
        )


def _frames_by_address() -> dict[int, int]:
    """Address → number of the frame that lies there, for all frames of this process."""
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
