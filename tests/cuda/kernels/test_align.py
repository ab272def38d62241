"""Sorted blocks compared with a plain loop over the routed ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxmoe.cuda.kernels.align import align_blocks


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 12),
    top_k=st.integers(1, 4),
    block=st.sampled_from([1, 4, 16]),
    padding=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_routed_row_is_in_a_block_of_its_expert(tokens, experts, top_k, block, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    ids[torch.rand(tokens, generator=generator) < padding] = -1
    blocks = align_blocks(ids, block, experts)

    flat = ids.flatten().tolist()
    rows, owners = [], []
    for expert in range(experts):
        mine = [row for row, routed in enumerate(flat) if routed == expert]
        mine += [len(flat)] * (-len(mine) % block)
        rows += mine
        owners += [expert] * (len(mine) // block)
    assert int(blocks.padded) == len(rows)
    assert blocks.rows[: len(rows)].tolist() == rows
    assert blocks.experts[: len(owners)].tolist() == owners
    assert (blocks.rows[len(rows) :] == len(flat)).all()
    assert blocks.rows.numel() % block == 0 and len(blocks.experts) == blocks.rows.numel() // block
    assert ((blocks.experts >= 0) & (blocks.experts < experts)).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_all_arrays_are_int32(dtype: torch.dtype) -> None:
    blocks = align_blocks(torch.zeros(3, 2, dtype=dtype), 16, 4)
    assert {array.dtype for array in blocks} == {torch.int32}


def test_the_example_of_vllms_documentation() -> None:
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32)
    blocks = align_blocks(ids, 4, 5)
    example = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert blocks.rows[:16].tolist() == example
    assert blocks.experts[:4].tolist() == [1, 2, 3, 4]
