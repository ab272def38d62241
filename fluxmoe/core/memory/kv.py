"""The KV cache as a tenant of the budget: one arena, committed in groups of blocks.

The engine addresses KV blocks by number and is independent of frames. The cache grows and shrinks
in *groups*: a group is the smallest number of consecutive blocks that fill whole frames. Each block
is contiguous (block-outermost, docs/project/adr/0004), so a group is one block if the block size is
a multiple of the frame size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from fluxmoe.core.memory.arena import Arena
from fluxmoe.core.memory.dlpack import Exported
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.core.memory.tenant import Tenant
from fluxmoe.core.types import Bools, Bytes
from fluxmoe.errors import InvariantError


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layout of KV blocks: block ``b`` occupies bytes ``[b, b + 1) * block_bytes`` of one buffer.

    Attributes:
        blocks: Maximum number of blocks to which the cache may grow.
        block_bytes: Size in bytes of one block over all layers.
        frame_bytes: Size in bytes of one frame.
    """

    blocks: int
    block_bytes: int
    frame_bytes: int

    @property
    def blocks_per_group(self) -> int:
        return self.frame_bytes // math.gcd(self.block_bytes, self.frame_bytes)

    @property
    def frames_per_group(self) -> int:
        """Frames per group, except in the last group, which may have fewer blocks."""
        return self.block_bytes // math.gcd(self.block_bytes, self.frame_bytes)

    @property
    def groups(self) -> int:
        return -(-self.blocks // self.blocks_per_group)

    @property
    def nbytes(self) -> int:
        """Size in bytes of the whole buffer, which is address space, not memory."""
        return self.blocks * self.block_bytes

    def blocks_of(self, group: int) -> range:
        first = group * self.blocks_per_group
        return range(first, min(first + self.blocks_per_group, self.blocks))

    def frames_of(self, group: int) -> int:
        nbytes = len(self.blocks_of(group)) * self.block_bytes
        return -(-nbytes // self.frame_bytes)

    def frames(self, groups: Collection[int]) -> int:
        """Return the number of frames that distinct ``groups`` need.

        The method contains no loop, because it is called in every step.
        """
        last, full = self.groups - 1, self.frames_per_group
        return len(groups) * full - (full - self.frames_of(last) if last in groups else 0)

    def groups_within(self, frames: int) -> int:
        """Return the number of groups, from the first on, that fit in ``frames`` frames."""
        count, rest = divmod(frames, self.frames_per_group)
        if count == self.groups - 1 and self.frames_of(count) <= rest:
            count += 1
        return min(count, self.groups)


class KVTenant(Tenant):
    """The buffer of the engine's KV cache, committed in groups.

    A newly committed group reads as zero, as the engine expects of a fresh cache, because frames
    are cleared when they are released. Uncommitted parts are read-only NaNs, so an engine that
    writes to a block that it does not have crashes instead of returning garbage.

    Args:
        pool: Ledger of the budget.
        substrate: Physical memory of the frames.
        layout: Blocks, groups and frames.
    """

    NAME = "kv"

    def __init__(self, pool: FramePool, substrate: Substrate, layout: KVLayout) -> None:
        super().__init__(pool, substrate)
        self.layout = layout
        self._arena = Arena(substrate, layout.nbytes)
        #: True for each group that is committed.
        self.committed: Bools = np.zeros(layout.groups, np.bool_)

    def buffer(self) -> Bytes:
        """Return all blocks as a uint8 view ``[blocks * block_bytes]``; see ``Arena.rows``."""
        buffer: Bytes = self._arena.rows(1, self.layout.nbytes)[0]
        return buffer

    def export(self) -> Exported:
        """Return all blocks for ``torch.from_dlpack``, on the frames' device."""
        return self._arena.export(self.layout.blocks, self.layout.block_bytes)

    def commit(self, groups: Iterable[int]) -> None:
        """Commit those of ``groups`` that are not yet committed; on an error, commit none.

        Raises:
            OutOfFramesError: The budget has no room.
            SubstrateError: A system call failed. If unmapping fails as well, some of the groups
                stay committed; see ``committed``.
        """
        done = []
        try:
            for group in self._known(groups):
                if self.committed[group]:
                    continue
                first = group * self.layout.frames_per_group
                self._commit(self._arena, first, self.layout.frames_of(group))
                self.committed[group] = True
                done.append(group)
        except BaseException:
            self.free(done)
            raise

    def free(self, groups: Iterable[int]) -> None:
        """Release those of ``groups`` that are committed; their blocks must not be in use.

        Raises:
            SubstrateError: Some groups could not be unmapped; the others were released.
        """
        with ExitStack() as each:  # runs all callbacks even if one fails
            for group in self._known(groups):
                each.callback(self._free, group)

    def _free(self, group: int) -> None:
        if self.committed[group]:
            frames = self._arena.decommit(
                group * self.layout.frames_per_group, self.layout.frames_of(group)
            )
            self.committed[group] = False
            self._give_up(frames)

    def close(self) -> None:
        """Release all frames and addresses. Idempotent."""
        if len(self.committed):
            frames = self._arena.close()
            self.committed = np.zeros(0, np.bool_)
            self._give_up(frames)

    def check(self) -> None:
        """Raise InvariantError unless exactly the committed groups are mapped, to owned frames."""
        self._arena.check()
        mapped = self._arena.frame_at >= 0
        expected = np.zeros_like(mapped)
        for group in np.flatnonzero(self.committed).tolist():
            first = group * self.layout.frames_per_group
            expected[first : first + self.layout.frames_of(group)] = True
        if np.any(mapped != expected):
            raise InvariantError("the mapped KV groups differ from the committed ones")
        if np.count_nonzero(mapped) != self.frames:
            raise InvariantError(
                f"{np.count_nonzero(mapped)} KV frames are mapped, but {self.frames} are owned"
            )

    def _known(self, groups: Iterable[int]) -> list[int]:
        wanted = list(groups)
        if any(not 0 <= group < len(self.committed) for group in wanted):
            raise InvariantError(
                f"not all KV groups {wanted} are within 0…{len(self.committed) - 1}"
            )
        return wanted
