"""PrefixCurve: what the prefix cache would find with any number of KV blocks.

vLLM forgets the block first that was freed longest ago, the end of a request before its beginning.
That is LRU, so a block is still there if fewer blocks than there are were used since (Mattson,
1970). The stack holds a sample of the blocks, chosen by their hash: the same ones in every request
(SHARDS, Waldspurger 2015). A split that finds nothing today is thus known to find much with more
room, before it is tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Points of the curve, from no block to all.
POINTS = 65


class PrefixCurve:
    """The share of prompt blocks that LRU finds, as a function of blocks, over the recent past.

    Args:
        blocks: Most blocks that the KV cache can have.
        sampled: About how many of them are followed.
        window: Requests after which the weight of older ones has fallen to 1/e.
    """

    def __init__(self, blocks: int, *, sampled: int = 512, window: int = 128) -> None:
        self._rate = min(1.0, sampled / blocks)
        self._depth = max(1, round(blocks * self._rate))
        self._growth, self._weight = 1.0 + 1.0 / window, 1.0
        #: Hashes, the one used longest ago first.
        self._stack: dict[bytes, None] = {}
        self._histogram = np.zeros(self._depth + 1)  # by depth; the last entry: not in the stack
        self._curve = np.zeros(0)

    def admitted(self, hashes: Sequence[bytes]) -> None:
        """A request begins to run: its prompt was looked up.

        Args:
            hashes: Of the full blocks of its tokens, from the first on; each stands for all tokens
                up to the block's end.
        """
        chosen = self._sample(hashes)
        if not chosen:
            return
        depths = {name: depth for depth, name in enumerate(reversed(self._stack))}
        for name in chosen:
            self._histogram[depths.get(name, self._depth)] += self._weight
        self._use(chosen)
        self._curve = np.zeros(0)
        self._weight *= self._growth
        if self._weight > 1e12:
            self._histogram /= self._weight
            self._weight = 1.0

    def freed(self, hashes: Sequence[bytes]) -> None:
        """A request has ended: all blocks that it has filled are now the last to be forgotten."""
        self._use(self._sample(hashes))

    def curve(self) -> Floats:
        """Share found with blocks at ``POINTS`` equal distances from none to all; empty if unknown.

        It never decreases.
        """
        if not self._curve.size and self._histogram.any():
            found = np.concatenate(([0.0], np.cumsum(self._histogram[:-1])))
            grid = np.linspace(0, self._depth, POINTS)
            self._curve = np.interp(grid, np.arange(self._depth + 1), found)
            self._curve /= self._histogram.sum()
        return self._curve

    def _sample(self, hashes: Sequence[bytes]) -> list[bytes]:
        most = int(self._rate * 2**32)
        return [name for name in hashes if int.from_bytes(name[:4], "little") < most]

    def _use(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):
            self._stack.pop(name, None)
            self._stack[name] = None
        while len(self._stack) > self._depth:
            del self._stack[next(iter(self._stack))]
