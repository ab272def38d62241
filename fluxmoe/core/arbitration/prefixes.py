"""PrefixCurve: the hit ratio of the prefix cache for any number of blocks.

The blocks that no request uses are the prefix cache. vLLM first evicts the block that was freed
longest ago, the end of a request before its beginning. That is LRU, so a block is still cached if
fewer blocks than the cache holds were freed since (Mattson, 1970). The stack holds a sample of the
blocks, chosen by their hash: the same ones in every request (SHARDS, Waldspurger 2015). Thus the
benefit of more room is known before it is tried, even if the current split finds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Number of points of the curve, from no block to all.
POINTS = 65


class PrefixCurve:
    """Share of prompt blocks that are found, by number of free blocks, over the recent past.

    Args:
        blocks: Most blocks that the KV cache can have.
        sampled: Approximate number of blocks in the sample.
        window: Number of requests after which the weight of older ones has fallen to 1/e.
    """

    def __init__(self, blocks: int, *, sampled: int = 512, window: int = 128) -> None:
        self._rate = min(1.0, sampled / blocks)
        self._depth = max(1, round(blocks * self._rate))
        self._growth, self._weight = 1.0 + 1.0 / window, 1.0
        #: Hashes of unused blocks, the one freed longest ago first.
        self._stack: dict[bytes, None] = {}
        #: Request → hashes of the blocks that it uses; number of requests that use each.
        self._used: dict[str, list[bytes]] = {}
        self._users: Counter[bytes] = Counter()
        self._histogram = np.zeros(self._depth + 1)  # by depth; the last entry: not in the stack
        self._shared = 0.0  # found because other requests were using them
        self._curve = np.zeros(0)

    def admitted(self, request: str, hashes: Sequence[bytes]) -> None:
        """Record that a request begins to run and its prompt was looked up.

        Args:
            request: Name of the request. One already running was preempted in between.
            hashes: Hashes of the full blocks of its tokens, from the first on; each covers all
                tokens up to the block's end.
        """
        if request in self._used:
            self.freed(request, hashes)
        names = self._sample(hashes)
        self._used[request] = names
        self._curve = np.zeros(0)
        self._weight *= self._growth
        if self._weight > 1e12:
            self._histogram /= self._weight
            self._shared /= self._weight
            self._weight = 1.0
        depths = {name: depth for depth, name in enumerate(reversed(self._stack))}
        for name in names:
            if name in self._users:
                self._shared += self._weight
            else:
                self._histogram[depths.get(name, self._depth)] += self._weight
                self._stack.pop(name, None)
        self._users.update(names)

    def freed(self, request: str, hashes: Sequence[bytes]) -> None:
        """Record that a request has ended: the blocks that it filled are the last to be evicted.

        A request that was never admitted filled none.
        """
        if request not in self._used:
            return
        for name in self._used.pop(request):
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
        for name in reversed(self._sample(hashes)):
            if name not in self._users:
                self._stack.pop(name, None)
                self._stack[name] = None
        while len(self._stack) > self._depth:
            del self._stack[next(iter(self._stack))]

    def curve(self) -> Floats:
        """Share found at ``POINTS`` numbers of free blocks, from none to all; empty if unknown.

        Never decreases. Blocks that running requests share are found without a free block.
        """
        total = self._histogram.sum() + self._shared
        if not self._curve.size and total:
            found = np.concatenate(([0.0], np.cumsum(self._histogram[:-1]))) + self._shared
            grid = np.linspace(0, self._depth, POINTS)
            self._curve = np.interp(grid, np.arange(self._depth + 1), found) / total
        return self._curve

    def saved(self) -> float:
        """Average number of blocks that a running request shares with another one."""
        if not self._used:
            return 0.0
        return (self._users.total() - len(self._users)) / self._rate / len(self._used)

    def _sample(self, hashes: Sequence[bytes]) -> list[bytes]:
        most = int(self._rate * 2**32)
        return [name for name in hashes if int.from_bytes(name[:4], "little") < most]
