"""What became of a cell."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell's comparison with the unpaged engine.

    Attributes:
        sequences: Compared.
        identical: Those of them whose tokens all agree.
        bits: Those whose log-probabilities (vLLM) or logits (torch) agree bit for bit, too.
        error: Of the engine, paged or not, if it did not answer.
        stock_differs: The unpaged engine did not agree with itself either (asked on a difference).
        stats: Counters that show what was paged, reused and split.
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


#: Counters of the pager that are kept.
COUNTERS = (
    "slots", "pages", "banks", "hits", "misses", "evictions", "released", "prefetch_hits",
)  # fmt: skip
