"""The inner loops of ``statistics``, which run over the arrays of a trace."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.types import Int64s
from fluxmoe.trace import Rows, TraceMeta

Floats = npt.NDArray[np.float64]


class Streams:
    """The last token of each request in each layer.

    Attributes:
        overlaps: float64 ``[layers, 2]``: the number of pairs of consecutive tokens, and the sum,
            over the pairs, of the share of the second token's experts that the first token also
            used.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self._meta = meta
        self._slots: dict[int, int] = {}
        self._last = np.full((0, meta.num_layers, meta.top_k), -1, np.int16)
        self.overlaps = np.zeros((meta.num_layers, 2), np.float64)  # pairs, sum of shares

    def add(self, rows: Rows, offsets: Int64s) -> None:
        """Add the next rows; the experts of row i are at ``offsets[i] … offsets[i + 1] - 1``."""
        # Without request numbers, each batch row is one request in decode; all prefill rows are a
        # single request.
        unknown = np.where(rows["phase"] == 0, -1, -2 - rows["token"].astype(np.int64))
        keys = np.where(rows["request"] >= 0, rows["request"], unknown)
        distinct, slot_of = np.unique(keys, return_inverse=True)
        slots = self._assign(distinct.tolist())
        _, ids = rows.lists["experts"]
        count_overlap(rows["layer"], slots[slot_of], offsets, ids, self._last, self.overlaps)

    def _assign(self, keys: Iterable[int]) -> Int64s:
        """Assign a slot to each key, freeing the slots of keys that are no longer present."""
        keys = list(keys)
        kept = {key: self._slots[key] for key in keys if key in self._slots}
        used = set(kept.values())
        free = [slot for slot in range(len(self._last)) if slot not in used]
        more = len(keys) - len(kept) - len(free)
        if more > 0:
            free += range(len(self._last), len(self._last) + more)
            fresh = np.full((more, *self._last.shape[1:]), -1, np.int16)
            self._last = np.concatenate([self._last, fresh])
        for key in keys:
            if key not in kept:
                kept[key] = free.pop()
                self._last[kept[key]] = -1
        self._slots = kept
        return np.asarray([kept[key] for key in keys])


@jit
def count_events(
    first: int,
    steps: Int64s,
    layers: Int64s,
    starts: Int64s,
    ends: Int64s,
    offsets: Int64s,
    ids: npt.NDArray[np.int32],
    lengths: Int64s,
    routed: Int64s,
    last_event: Int64s,
    distances: Int64s,
    seen_in: Int64s,
    windows: Int64s,
    unions: Int64s,
) -> int:
    """Add events to the arrays after ``lengths``; return the sum of the events' distinct experts.

    ``windows`` has, per length: the index of the current window and its pages so far; the number of
    complete windows, and the sum and the maximum of their pages. ``seen_in`` is the last window
    that used each page. ``unions`` has, per bit length of tokens − 1: the events, their tokens and
    their distinct experts.
    """
    accesses = 0
    farthest = distances.size - 1
    for e in range(layers.size):
        event, layer = first + e, layers[e]
        for w in range(lengths.size):
            window = steps[e] // lengths[w]
            if window != windows[w, 0]:
                windows[w, 2] += 1
                windows[w, 3] += windows[w, 1]
                windows[w, 4] = max(windows[w, 4], windows[w, 1])
                windows[w, 0] = window
                windows[w, 1] = 0
        distinct = 0
        for i in range(offsets[starts[e]], offsets[ends[e]]):
            routed[layer, ids[i]] += 1
            page = layer * routed.shape[1] + ids[i]
            before = last_event[page]
            if before == event:
                continue
            distinct += 1
            last_event[page] = event
            if before >= 0:
                distances[min(event - before, farthest)] += 1
            for w in range(lengths.size):
                if seen_in[w, page] != windows[w, 0]:
                    seen_in[w, page] = windows[w, 0]
                    windows[w, 1] += 1
        accesses += distinct
        tokens = ends[e] - starts[e]
        bits, rest = 0, tokens - 1
        while rest > 0:
            bits += 1
            rest >>= 1
        unions[bits, 0] += 1
        unions[bits, 1] += tokens
        unions[bits, 2] += distinct
    return accesses


@jit
def count_overlap(
    layers: npt.NDArray[np.int16],
    slots: Int64s,
    offsets: Int64s,
    ids: npt.NDArray[np.int32],
    last: npt.NDArray[np.int16],
    overlaps: Floats,
) -> None:
    """Compare every row with its slot's previous row in ``last``, then store the row there."""
    for row in range(slots.size):
        mine = last[slots[row], layers[row]]
        start, end = offsets[row], offsets[row + 1]
        if start == end:
            continue
        if mine[0] >= 0:
            common = 0
            for i in range(start, end):
                for j in range(mine.size):
                    if mine[j] == ids[i]:
                        common += 1
            overlaps[layers[row], 0] += 1
            overlaps[layers[row], 1] += common / (end - start)
        mine[:] = -1
        for i in range(start, end):
            mine[i - start] = ids[i]


@jit
def compare_predictions(
    steps: npt.NDArray[np.int32],
    layers: npt.NDArray[np.int16],
    bounds: Int64s,
    offsets: Int64s,
    ids: npt.NDArray[np.int32],
    guess_offsets: Int64s,
    guesses: npt.NDArray[np.int32],
    counted: Int64s,
) -> None:
    """Count, per layer, the tokens' experts and those of them that the previous layer predicted.

    ``bounds`` contains the first row of each event, and the end of the last event.
    """
    for e in range(bounds.size - 2):
        first, following = bounds[e], bounds[e + 1]
        tokens = following - first
        if (
            steps[first] != steps[following]
            or layers[first] + 1 != layers[following]
            or bounds[e + 2] - following != tokens
        ):
            continue
        for token in range(tokens):
            for i in range(offsets[following + token], offsets[following + token + 1]):
                counted[layers[following], 1] += 1
                for j in range(guess_offsets[first + token], guess_offsets[first + token + 1]):
                    if guesses[j] == ids[i]:
                        counted[layers[following], 0] += 1
                        break
