"""The balloon on vLLM's block pool: held groups, and the numbers that the pool reports."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.errors import InvariantError

pytestmark = pytest.mark.vllm

#: Two blocks fill three frames.
LAYOUT = KVLayout(blocks=20, block_bytes=6144, frame_bytes=4096)


def balloon(groups: int, *, blocks: int = 20, watermark: float = 0.0) -> tuple[Any, Any]:
    from vllm.v1.core.block_pool import BlockPool

    from fluxmoe.backends.vllm.scheduler.balloon import Balloon

    manager = SimpleNamespace(block_pool=BlockPool(blocks, True, 32), watermark_blocks=0)
    return Balloon(manager, LAYOUT, groups, watermark), manager


def remember(pool: Any, number: int) -> None:
    """Register a block in the prefix cache, as vLLM does when a block is full."""
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    key = make_block_hash_with_group_id(BlockHash(bytes([number] * 32)), 0)
    pool._insert_block_hash(key, pool.blocks[number], num_tokens=32)


def test_blocks_without_memory_are_handed_out_to_nobody() -> None:
    held, manager = balloon(4)
    pool = manager.block_pool
    assert held.held == frozenset(range(4, 10))
    assert pool.get_num_free_blocks() == 7  # of eight blocks, one is vLLM's null block
    assert {block.block_id for block in pool.get_new_blocks(7)} == set(range(1, 8))
    with pytest.raises(ValueError, match="Cannot get 1 free blocks"):
        pool.get_new_blocks(1)
    held.release([4])
    assert {block.block_id for block in pool.get_new_blocks(2)} == {8, 9}


def test_usage_and_reset_know_nothing_of_held_blocks() -> None:
    held, manager = balloon(4)
    pool = manager.block_pool
    assert pool.get_usage() == 0.0
    blocks = pool.get_new_blocks(7)
    assert (pool.get_usage(), held.used()) == (1.0, 8)
    assert not pool.reset_prefix_cache()
    pool.free_blocks(blocks)
    assert pool.reset_prefix_cache()
    assert pool.num_gpu_blocks == 20
    held.hold(4)
    assert pool.get_usage() == 0.0


def test_the_least_valuable_groups_go_first() -> None:
    held, manager = balloon(10)
    pool = manager.block_pool
    blocks = {block.block_id: block for block in pool.get_new_blocks(19)}
    for number in (2, 3, 6, 7, 9):
        remember(pool, number)
    pool.free_blocks([blocks[n] for n in (6, 2, 7, 9, 3)])  # cached, the oldest first
    pool.free_blocks([blocks[n] for n in (8, 12, 13, 14, 15, 16)])  # 17 stays in use
    # First groups 6 and 7, which cache nothing; then group 3, whose newer block is older than those
    # of groups 4 and 1.
    assert held.hold(2) == (7, 6)
    assert held.hold(1) == (3,)
    assert held.cached() <= 3
    assert held.hold(10) == (4, 1)
    assert held.hold(1) == ()  # every other group has a block in use
    assert pool.cached_block_hash_to_block.get_one_block(None) is None
    assert len(pool.cached_block_hash_to_block) == 0  # held blocks are not cached


def test_the_watermark_is_of_the_blocks_that_exist() -> None:
    held, manager = balloon(5, watermark=0.5)
    assert manager.watermark_blocks == 5
    held.release([5, 6])
    assert manager.watermark_blocks == 7


def test_mistakes_are_noticed() -> None:
    held, _ = balloon(4)
    with pytest.raises(InvariantError, match="group 2 is not held"):
        held.release([2])
    with pytest.raises(InvariantError, match="has 21 KV blocks, but the worker 20"):
        balloon(4, blocks=21)


@pytest.mark.parametrize("seed", range(3))
def test_random_use(seed: int) -> None:
    held, manager = balloon(5)
    pool, rng, used = manager.block_pool, random.Random(seed), []
    for _ in range(400):
        what = rng.randrange(4)
        if what == 0 and pool.get_num_free_blocks():
            used += pool.get_new_blocks(rng.randint(1, pool.get_num_free_blocks()))
        elif what == 1 and used:
            rng.shuffle(used)
            freed = [used.pop() for _ in range(rng.randint(1, len(used)))]
            for block in freed:
                if rng.random() < 0.5 and block.block_hash is None:
                    remember(pool, block.block_id)
            pool.free_blocks(freed)
        elif what == 2:
            held.hold(rng.randint(1, 4))
        elif held.held:
            held.release(rng.sample(sorted(held.held), 1))
        blocks = {block for group in held.held for block in LAYOUT.blocks_of(group)}
        assert not blocks & {block.block_id for block in used}
        assert 0 not in blocks
        assert held.used() == len(used) + 1
        assert pool.get_num_free_blocks() == 20 - 1 - len(used) - len(blocks)
        free = pool.free_block_queue.get_all_free_blocks()
        assert len(free) == pool.get_num_free_blocks()
