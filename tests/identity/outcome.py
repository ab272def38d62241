"""Outcome of a cell."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell's comparison with the unpaged engine.

    Attributes:
        sequences: Number of compared sequences.
        identical: Number of sequences with equal tokens.
        bits: Number of sequences whose log-probabilities (vLLM) or logits (torch) are also equal
            bit for bit.
        error: Error of the engine, paged or not, if it failed.
        stock_differs: True if the unpaged engine does not reproduce its own answers (checked only
            after a difference).
        stats: Counters of paging and, under vLLM, of cached prompt tokens and steps.
    """

    sequences: int = 0
    identical: int = 0
    bits: int = 0
    error: str = ""
    stock_differs: bool = False
    stats: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.error and self.sequences == self.identical == self.bits > 0


#: Recorded counters of the pager.
COUNTERS = (
    "slots", "pages", "banks", "hits", "misses", "evictions", "released", "prefetch_hits",
)  # fmt: skip
