"""PrefixCurve, the hit ratio of the prefix cache as a function of the number of blocks.

Blocks that no request uses form the prefix cache. vLLM first evicts the block that was freed
longest ago, and the end of a request before its beginning. This is LRU, so a block is still cached
if fewer blocks have been freed after it than fit in the cache (Mattson, 1970). The stack holds a
sample of the blocks, selected by hash, so that the sample includes the same blocks in every request
(SHARDS, Waldspurger 2015). The benefit of a larger cache is therefore known in advance, even if the
current cache has no hits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Number of points on the curve, from no blocks to all blocks.
POINTS = 65


class PrefixCurve:
    """Hit ratio of prompt blocks as a function of the number of free blocks, over the recent past.

    Args:
        blocks: Maximum number of blocks in the KV cache.
        sampled: Approximate number of blocks in the sample.
        window: Number of requests after which the weight of a request has decayed to 1/e.
    """

    def __init__(self, blocks: int, *, sampled: int = 512, window: int = 128) -> None:
        self._rate = min(1.0, sampled / blocks)
        self._depth = max(1, round(blocks * self._rate))
        self._growth, self._weight = 1.0 + 1.0 / window, 1.0
        #: Hashes of unused blocks, least recently freed first.
        self._stack: dict[bytes, None] = {}
        #: Request → hashes of its blocks; and hash → number of requests that use the block.
        self._used: dict[str, list[bytes]] = {}
        self._users: Counter[bytes] = Counter()
        # Lookups by depth in the stack; the last entry counts blocks that are not in the stack.
        self._histogram = np.zeros(self._depth + 1)
        self._shared = 0.0  # hits on blocks that other requests use
        self._curve = np.zeros(0)

    def admitted(self, request: str, hashes: Sequence[bytes]) -> None:
        """Record that a request starts to run after its prompt was looked up.

        Args:
            request: Request id. If the request is already recorded as running, it was preempted.
            hashes: Hashes of the request's full blocks, beginning with the first; each hash covers
                all tokens up to the end of its block.
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
        """Record that a request has finished: the blocks that it filled will be evicted last.

        A request that was never admitted has filled no blocks.
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
        """Return the hit ratio at ``POINTS`` numbers of free blocks, from none to all.

        The curve does not decrease; it is empty if unknown. Blocks that running requests share are
        hits even without a free block.
        """
        total = self._histogram.sum() + self._shared
        if not self._curve.size and total:
            found = np.concatenate(([0.0], np.cumsum(self._histogram[:-1]))) + self._shared
            grid = np.linspace(0, self._depth, POINTS)
            self._curve = np.interp(grid, np.arange(self._depth + 1), found) / total
        return self._curve

    def saved(self) -> float:
        """Return the average number of blocks that a running request shares with others."""
        if not self._used:
            return 0.0
        return (self._users.total() - len(self._users)) / self._rate / len(self._used)

    def _sample(self, hashes: Sequence[bytes]) -> list[bytes]:
        most = int(self._rate * 2**32)
        return [name for name in hashes if int.from_bytes(name[:4], "little") < most]
