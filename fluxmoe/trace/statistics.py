"""Statistics of a trace from one streaming pass: skew, working sets, reuse, overlap and unions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.trace import Rows, TraceMeta, TraceReader
from fluxmoe.trace.counting import Floats, Streams, compare_predictions, count_events

#: Window lengths of the working sets, in steps.
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Maximum reuse distance, in events; longer distances are counted as the maximum.
_FARTHEST = 1 << 20
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Layer:
    """Routing statistics of one layer.

    Attributes:
        gini: Gini coefficient of the experts' shares; 0 = equal shares, 1 = all tokens
            go to one expert.
        entropy: Entropy of the experts' shares relative to its maximum; 1 = equal shares.
        top_share: Share of the most popular tenth of the experts (at least one expert).
        experts_used: Number of experts routed to at least once.
        overlap: Mean share of a token's experts that the request's previous token also used; None
            if no request has consecutive tokens.
        predicted: Share of the layer's routed experts that the previous layer predicted; None if
            the trace has no predictions.
    """

    gini: float
    entropy: float
    top_share: float
    experts_used: int
    overlap: float | None
    predicted: float | None


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Number of distinct pages in a window of ``steps``: mean and maximum over complete windows."""

    steps: int
    mean_pages: float
    max_pages: int


@dataclass(frozen=True, slots=True)
class Union:
    """Mean number of distinct experts in events with ``tokens_from`` to ``tokens_to`` tokens.

    ``uniform`` is the number expected if the events' mean number of tokens were routed uniformly
    and independently.
    """

    tokens_from: int
    tokens_to: int
    events: int
    mean_experts: float
    uniform: float


@dataclass(frozen=True, slots=True)
class Reuse:
    """Number of events between two uses of a page.

    Attributes:
        first_uses: Number of first uses of a page.
        reuses: Number of other uses.
        quantiles: Quantile → number of events.
        histogram: Entry i is the number of reuses after 2^i … 2^(i+1) − 1 events.
    """

    first_uses: int
    reuses: int
    quantiles: dict[str, int]
    histogram: list[int]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of a trace.

    ``popularity`` contains the experts' shares ``[layers][experts]``; each layer's sum is 1.
    """

    meta: TraceMeta
    columns: tuple[str, ...]
    rows: int
    steps: int
    events: int
    prefill_events: int
    requests: int
    accesses: int
    routed: int
    pages_used: int
    layers: list[Layer]
    working_sets: list[WorkingSet]
    reuse: Reuse
    unions: list[Union]
    popularity: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(path: str | Path) -> Statistics:
    """Read a trace once and compute its statistics; the memory needed does not grow with the trace.

    Raises:
        TraceError: The trace is invalid or cannot be read.
    """
    reader = TraceReader(path)
    more = ["request", *(["predicted"] if "predicted" in reader.columns else [])]
    counts = _Counts(reader.meta)
    for rows in reader.rows(more):
        counts.add(rows)
    return counts.result(reader.columns)


class _Counts:
    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        layers, experts, pages = meta.num_layers, meta.experts_per_layer, meta.geometry.num_pages
        self.rows = self.steps = self.events = self.prefill = self.accesses = 0
        self._last_step, self._largest_request = -1, -1
        self._routed = np.zeros((layers, experts), np.int64)
        self._last_event = np.full(pages, -1, np.int64)
        self._distances = np.zeros(_FARTHEST + 1, np.int64)
        # Per window length: the last window that used each page.
        self._seen_in = np.full((len(WINDOWS), pages), -1, np.int64)
        # Per window length: the current window and its pages so far; the number of complete
        # windows, the sum of their pages, and the largest number of pages in one of them.
        self._windows = np.zeros((len(WINDOWS), 5), np.int64)
        # By the bit length of tokens - 1: events, their tokens, and their distinct experts.
        self._unions = np.zeros((33, 3), np.int64)
        self._streams = Streams(meta)
        self._guessed = np.zeros((layers, 2), np.int64)  # experts predicted, experts routed
        self._held: Rows | None = None

    def add(self, rows: Rows) -> None:
        starts = rows.starts()
        ends = np.concatenate([starts[1:], [len(rows)]])
        width, ids = rows.lists["experts"]
        offsets = np.concatenate([[0], np.cumsum(width, dtype=np.int64)])
        steps, layers = rows["step"][starts], rows["layer"][starts]
        new = np.diff(np.concatenate([[self._last_step], steps])) != 0
        ordinals = self.steps - 1 + np.cumsum(new)
        self.accesses += count_events(
            self.events,
            ordinals,
            layers.astype(np.int64),
            starts,
            ends,
            offsets,
            ids,
            np.asarray(WINDOWS),
            self._routed,
            self._last_event,
            self._distances,
            self._seen_in,
            self._windows,
            self._unions,
        )
        self.steps, self._last_step = int(ordinals[-1]) + 1, int(steps[-1])
        self.rows += len(rows)
        self.events += len(starts)
        self.prefill += int((np.minimum.reduceat(rows["phase"], starts) == 0).sum())
        self._largest_request = max(self._largest_request, int(rows["request"].max()))
        self._streams.add(rows, offsets)
        if "predicted" in rows.lists:
            self._compare(rows)

    def _compare(self, rows: Rows) -> None:
        """Compare each event's predictions with the routing of the next layer's event."""
        if self._held is not None:
            rows = self._held.then(rows)
        starts = rows.starts()
        (width, ids), (guesses, guessed) = rows.lists["experts"], rows.lists["predicted"]
        compare_predictions(
            rows["step"],
            rows["layer"],
            np.concatenate([starts, [len(rows)]]),
            np.concatenate([[0], np.cumsum(width, dtype=np.int64)]),
            ids,
            np.concatenate([[0], np.cumsum(guesses, dtype=np.int64)]),
            guessed,
            self._guessed,
        )
        self._held = rows.split(int(starts[-1]))[1]

    def result(self, columns: tuple[str, ...]) -> Statistics:
        routed = self._routed
        totals = np.maximum(routed.sum(axis=1, keepdims=True), 1)
        shares = routed / totals
        return Statistics(
            meta=self.meta,
            columns=columns,
            rows=self.rows,
            steps=self.steps,
            events=self.events,
            prefill_events=self.prefill,
            requests=self._largest_request + 1,
            accesses=self.accesses,
            routed=int(routed.sum()),
            pages_used=int((routed > 0).sum()),
            layers=[self._layer(layer, shares[layer]) for layer in range(len(routed))],
            working_sets=self._working_sets(),
            reuse=self._reuse(),
            unions=self._union_table(),
            popularity=[[round(share, 6) for share in row] for row in shares.tolist()],
        )

    def _layer(self, layer: int, shares: Floats) -> Layer:
        pairs, common = self._streams.overlaps[layer].tolist()
        hits, wanted = self._guessed[layer].tolist()
        return Layer(
            gini=gini(shares),
            entropy=entropy(shares),
            top_share=top_share(shares),
            experts_used=int((shares > 0).sum()),
            overlap=common / pairs if pairs else None,
            predicted=hits / wanted if wanted else None,
        )

    def _working_sets(self) -> list[WorkingSet]:
        found = []
        for length, (_, pages, whole, total, most) in zip(
            WINDOWS, self._windows.tolist(), strict=True
        ):
            if self.steps % length == 0:  # the current window is complete as well
                whole, total, most = whole + 1, total + pages, max(most, pages)
            if whole:
                found.append(WorkingSet(length, total / whole, most))
        return found

    def _reuse(self) -> Reuse:
        counts = self._distances
        reuses = int(counts.sum())
        cumulative = np.cumsum(counts)
        quantiles = {
            f"{q:g}": int(np.searchsorted(cumulative, q * reuses)) for q in QUANTILES if reuses
        }
        bins = [int(counts[1 << i : 2 << i].sum()) for i in range(_FARTHEST.bit_length())]
        while bins and not bins[-1]:
            bins.pop()
        return Reuse(self.accesses - reuses, reuses, quantiles, bins)

    def _union_table(self) -> list[Union]:
        table = []
        experts, top_k = self.meta.experts_per_layer, self.meta.top_k
        for bits, (events, tokens, distinct) in enumerate(self._unions.tolist()):
            if events:
                first = (1 << (bits - 1)) + 1 if bits else 1
                mean = tokens / events
                uniform = experts * (1 - (1 - top_k / experts) ** mean)
                table.append(Union(first, 1 << bits, events, distinct / events, uniform))
        return table


def gini(shares: Floats) -> float:
    """Compute the Gini coefficient: half the shares' mean absolute difference over their mean."""
    ordered, n = np.sort(shares), len(shares)
    total = ordered.sum()
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total)) if total else 0.0


def entropy(shares: Floats) -> float:
    """Compute the Shannon entropy relative to that of equal shares; 1 for a single expert."""
    positive = shares[shares > 0]
    if len(shares) < 2 or not len(positive):
        return 1.0
    return float(-(positive * np.log(positive)).sum() / np.log(len(shares)))


def top_share(shares: Floats) -> float:
    """Return the sum of the largest tenth of the shares, which is at least one share."""
    count = max(1, round(len(shares) / 10))
    return float(np.sort(shares)[::-1][:count].sum())
