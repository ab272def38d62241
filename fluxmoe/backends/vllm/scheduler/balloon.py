"""The balloon, which hides KV blocks without memory from the scheduler, as in VM ballooning.

vLLM's pool has all blocks of the KV cache at its maximum size. Blocks without committed memory are
*held*: they are removed from the free queue and the prefix cache, and are in no request. To vLLM,
held blocks look used, so the two places where that matters are corrected.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fluxmoe.backends.vllm.compat.connector import BlockPool
from fluxmoe.backends.vllm.names import NAMES
from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.errors import InvariantError


class BalloonPool(BlockPool):
    """vLLM's block pool with held blocks. ``Balloon`` changes the class of a pool to this one."""

    num_gpu_blocks: int
    held_blocks: int

    def get_usage(self) -> float:
        """Return the used fraction of the blocks that have memory."""
        blocks = self.num_gpu_blocks - 1 - self.held_blocks  # one is vLLM's null block
        return 1.0 - self.get_num_free_blocks() / blocks if blocks > 0 else 0.0

    def reset_prefix_cache(self) -> bool:
        """Reset the prefix cache like vLLM, but without counting held blocks as used."""
        blocks = self.num_gpu_blocks
        self.num_gpu_blocks = blocks - self.held_blocks
        try:
            done: bool = super().reset_prefix_cache()
            return done
        finally:
            self.num_gpu_blocks = blocks


class Balloon:
    """The groups of a pool's blocks that are held. Implements ``controller.BlockSource``.

    Args:
        manager: vLLM's ``KVCacheManager``; its block pool has not been used yet.
        layout: Grouping of the blocks.
        groups: Number of groups with committed memory; the others are held from the start.
        watermark: Fraction of the blocks that vLLM keeps free when it admits requests.
    """

    def __init__(self, manager: Any, layout: KVLayout, groups: int, watermark: float) -> None:
        NAMES.require_on("KVCacheManager", manager)
        NAMES.require_on("BlockPool", manager.block_pool)
        self._manager, self._watermark = manager, watermark
        self._pool = pool = manager.block_pool
        self._layout = layout
        if pool.num_gpu_blocks != layout.blocks:
            raise InvariantError(
                f"the scheduler has {pool.num_gpu_blocks} KV blocks, but the worker {layout.blocks}"
            )
        pool.__class__ = BalloonPool  # vLLM has no option for another kind of pool
        pool.held_blocks = 0
        self._held: set[int] = set()
        for group in range(groups, layout.groups):
            self._take(group)
        self._resized()

    @property
    def held(self) -> frozenset[int]:
        """The groups that are held."""
        return frozenset(self._held)

    def hold(self, groups: int) -> tuple[int, ...]:
        """Hold up to ``groups`` groups that have no block in use, and return these groups.

        Groups without cached prefixes come first, then the groups whose most valuable block vLLM
        would evict soonest. Among equals, the last group comes first, to keep the cache dense.
        """
        worth = {
            block.block_id: 0 if block.block_hash is None else age + 1
            for age, block in enumerate(self._pool.free_block_queue.get_all_free_blocks())
        }
        candidates = []
        for group in range(self._layout.groups):
            blocks = self._layout.blocks_of(group)
            if group not in self._held and all(block in worth for block in blocks):
                candidates.append((max(worth[block] for block in blocks), -group))
        taken = tuple(-group for _, group in sorted(candidates)[:groups])
        for group in taken:
            self._take(group)
        self._resized()
        return taken

    def release(self, groups: Iterable[int]) -> None:
        """Make the blocks of held groups available again."""
        for group in sorted(groups):
            if group not in self._held:
                raise InvariantError(f"KV group {group} is not held")
            self._held.remove(group)
            blocks = [self._pool.blocks[block] for block in self._layout.blocks_of(group)]
            self._pool.held_blocks -= len(blocks)
            self._pool.free_blocks(blocks)
        self._resized()

    def used(self) -> int:
        """Count the blocks in use, including the null block, whose group must remain."""
        pool = self._pool
        return int(pool.num_gpu_blocks - pool.held_blocks - pool.get_num_free_blocks())

    def cached(self) -> int:
        """Estimate the number of free blocks with a cached prefix."""
        pool = self._pool
        # Full blocks of running requests are cached as well; their last blocks are not.
        remembered = len(pool.cached_block_hash_to_block) - self.used()
        return max(0, min(remembered, int(pool.get_num_free_blocks())))

    def _take(self, group: int) -> None:
        pool = self._pool
        for number in self._layout.blocks_of(group):
            block = pool.blocks[number]
            pool.free_block_queue.remove(block)
            if pool._reuse_watchers:
                pool._notify_reuse([block])
            pool._maybe_evict_cached_block(block)
            block.ref_cnt = 1
            pool.held_blocks += 1
        self._held.add(group)

    def _resized(self) -> None:
        blocks = self._pool.num_gpu_blocks - self._pool.held_blocks
        self._manager.watermark_blocks = int(self._watermark * blocks)
