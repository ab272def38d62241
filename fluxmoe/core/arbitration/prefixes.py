"""PrefixCurve: what the prefix cache would find if it had any number of blocks.

The blocks that no request uses are the prefix cache. vLLM forgets the one first that was freed
longest ago, the end of a request before its beginning. That is LRU, so a block is still there if
fewer blocks than there are were freed since (Mattson, 1970). The stack holds a sample of the
blocks, chosen by their hash: the same ones in every request (SHARDS, Waldspurger 2015). A split
that finds nothing today is thus known to find much with more room, before it is tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Points of the curve, from no block to all.
POINTS = 65


class PrefixCurve:
    """The share of prompt blocks that are found, by free blocks, over the recent past.

    Args:
        blocks: Most blocks that the KV cache can have.
        sampled: About how many of them are followed.
        window: Requests after which the weight of older ones has fallen to 1/e.
    """

    def __init__(self, blocks: int, *, sampled: int = 512, window: int = 128) -> None:
        self._rate = min(1.0, sampled / blocks)
        self._depth = max(1, round(blocks * self._rate))
        self._growth, self._weight = 1.0 + 1.0 / window, 1.0
        #: Hashes of blocks that nobody uses, the one freed longest ago first.
        self._stack: dict[bytes, None] = {}
        #: Request → hashes of the blocks that it uses; how many requests use each.
        self._used: dict[str, list[bytes]] = {}
        self._users: Counter[bytes] = Counter()
        self._histogram = np.zeros(self._depth + 1)  # by depth; the last entry: not in the stack
        self._shared = 0.0  # found because other requests use them at the time
        self._curve = np.zeros(0)

    def admitted(self, request: str, hashes: Sequence[bytes]) -> None:
        """A request begins to run: its prompt was looked up.

        Args:
            request: Its name. One that was running has been preempted since.
            hashes: Of the full blocks of its tokens, from the first on; each stands for all tokens
                up to the block's end.
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
        """A request has ended: the blocks that it has filled are the last to be forgotten.

        One that was never admitted has filled none.
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
        """Share found with ``POINTS`` numbers of free blocks, from none to all; empty if unknown.

        It never decreases. What running requests share is found without a free block.
        """
        total = self._histogram.sum() + self._shared
        if not self._curve.size and total:
            found = np.concatenate(([0.0], np.cumsum(self._histogram[:-1]))) + self._shared
            grid = np.linspace(0, self._depth, POINTS)
            self._curve = np.interp(grid, np.arange(self._depth + 1), found) / total
        return self._curve

    def saved(self) -> float:
        """Blocks that a running request does not need because another one has them, on average."""
        if not self._used:
            return 0.0
        return (self._users.total() - len(self._users)) / self._rate / len(self._used)

    def _sample(self, hashes: Sequence[bytes]) -> list[bytes]:
        most = int(self._rate * 2**32)
        return [name for name in hashes if int.from_bytes(name[:4], "little") < most]
