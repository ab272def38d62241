"""A trace in memory, as flat arrays that all runs of one invocation share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.policy.paging import PageView
from fluxmoe.core.types import Bools, EventList, Int64s, Phase
from fluxmoe.trace import TraceMeta, TraceReader


@dataclass(frozen=True, slots=True)
class Future:
    """The future, for oracles. P is the number of pages, A that of routed (token, expert) pairs.

    Attributes:
        first: int64 ``[P]``, the first event that uses each page; ``PageView.NO_NEXT_USE`` if there
            is none.
        later: int64 ``[A]``, the next event that uses the page of each pair, in the order of
            ``Events.ids``; ``PageView.NO_NEXT_USE`` if there is none.
    """

    first: Int64s
    later: Int64s


class Events:
    """All events of a trace. Read-only by convention.

    Args:
        meta: Metadata of the trace.
        block: Events of the trace, already validated, without the future.
    """

    def __init__(self, meta: TraceMeta, block: EventList) -> None:
        self.meta, self.block = meta, block

    @classmethod
    def load(cls, path: str | Path) -> Events:
        """Read a trace file; raise TraceError if it is invalid or cannot be read."""
        reader = TraceReader(path)
        columns = zip(*reader.blocks(predicted=True), strict=True)
        joined: dict[str, Any] = {
            name: _joined(parts) if name.endswith("offsets") else np.concatenate(parts)
            for name, parts in zip(EventList._fields, columns, strict=True)
        }
        return cls(reader.meta, EventList(**joined))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.meta.described}, events={len(self)})"

    def __len__(self) -> int:
        return len(self.block.step)

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Routed experts of all events, concatenated, including repeats."""
        return self.block.ids

    def __iter__(self) -> Iterator[tuple[int, int, Phase, slice]]:
        """Yield (step, layer, phase, slice of ``ids``) for each event."""
        phases = (Phase.PREFILL, Phase.DECODE)
        step, layer, phase, bounds = (np.asarray(column).tolist() for column in self.block[:4])
        for i, start in enumerate(bounds[:-1]):
            yield step[i], layer[i], phases[phase[i]], slice(start, bounds[i + 1])

    @property
    def predicted(self) -> tuple[Int64s, npt.NDArray[np.int32]] | None:
        """Predictions of each event's layer for the next layer: offsets ``[N + 1]`` and experts."""
        offsets = self.block.guess_offsets
        return (offsets, self.block.guesses) if offsets.size else None

    @cached_property
    def largest(self) -> int:
        """Number of distinct experts in the largest event."""
        return int(self.sizes.max())

    @cached_property
    def widest(self) -> int:
        """Largest number of distinct experts of a token: the minimum number of slots per bank."""
        if not self.block.starts.size:
            return self.largest
        seen = np.full(self.meta.experts_per_layer, -1, np.int64)
        return _widest(self.ids, self.block.starts, seen)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int32]:
        """Number of distinct experts in each event."""
        sizes = np.zeros(len(self), np.int32)
        seen = np.full(self.meta.experts_per_layer, -1, np.int64)
        _count_distinct(self.block.offsets, self.ids, seen, sizes)
        return sizes

    @cached_property
    def cycle(self) -> int:
        """Median number of distinct pages used by a step.

        With fewer slots than this, a policy such as LRU evicts pages before the next step uses
        them.
        """
        starts = np.flatnonzero(np.diff(self.block.step, prepend=self.block.step[:1] - 1))
        return int(np.median(np.add.reduceat(self.sizes, starts, dtype=np.int64)))

    @cached_property
    def future(self) -> Future:
        """Next uses of the pages, computed in one backward pass."""
        first = np.full(self.meta.geometry.num_pages, PageView.NO_NEXT_USE, np.int64)
        later = np.empty(self.ids.size, np.int64)
        experts, block = self.meta.experts_per_layer, self.block
        _look_ahead(block.layer, block.offsets, block.ids, experts, first, later)
        return Future(first, later)

    @cached_property
    def foreseen(self) -> EventList:
        """All events with their future, for oracles."""
        return self.block._replace(later=self.future.later)


def _joined(offsets: Sequence[Int64s]) -> Int64s:
    """Return offsets into the concatenation of several arrays, given the offsets into each."""
    if not offsets[0].size:
        return offsets[0]
    starts = np.cumsum([0, *(part[-1] for part in offsets)])
    ends = [part[1:] + start for part, start in zip(offsets, starts[:-1], strict=True)]
    return np.concatenate([np.zeros(1, np.int64), *ends])


@jit
def _count_distinct(
    offsets: Int64s, ids: npt.NDArray[np.int32], seen: Int64s, sizes: npt.NDArray[np.int32]
) -> None:
    for event in range(offsets.size - 1):
        for i in range(offsets[event], offsets[event + 1]):
            if seen[ids[i]] != event:
                seen[ids[i]] = event
                sizes[event] += 1


@jit
def _widest(ids: npt.NDArray[np.int32], starts: Bools, seen: Int64s) -> int:
    token = width = widest = 0
    for i in range(ids.size):
        if starts[i]:
            token, width = i, 0
        if seen[ids[i]] != token:
            seen[ids[i]] = token
            width += 1
        widest = max(widest, width)
    return widest


@jit
def _look_ahead(
    layer: npt.NDArray[np.int16],
    offsets: Int64s,
    ids: npt.NDArray[np.int32],
    experts: int,
    upcoming: Int64s,
    later: Int64s,
) -> None:
    for event in range(layer.size - 1, -1, -1):
        for i in range(offsets[event], offsets[event + 1]):
            later[i] = upcoming[np.int64(layer[event]) * experts + ids[i]]
        # In a second loop, so that the next use of an expert that several tokens of the event share
        # is a later event, not this one.
        for i in range(offsets[event], offsets[event + 1]):
            upcoming[np.int64(layer[event]) * experts + ids[i]] = event
