"""The initial split: every branch, and errors with field, value and remedy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmoe.core.memory.sizing import Wish, first_split
from fluxmoe.errors import BudgetTooSmallError, ConfigError
from fluxmoe.sizes import shown

MIB = 1 << 20


def split(frames, experts, kv):
    """Return the targets of both tenants."""
    a, b = first_split(
        frames * MIB,
        MIB,
        Wish(*experts, reason="one layer of 64 experts"),
        Wish(*kv, reason="one sequence of 8192 tokens"),
    )
    assert (a.min, a.max, b.min) == (*experts[:2], kv[0])
    assert b.max == max(kv[1], b.target)  # memory that no tenant needs holds cached prefixes
    return a.target, b.target


@pytest.mark.parametrize(
    ("frames", "experts", "kv", "expected"),
    [
        # no targets: KV for all requests that can run, then experts, then KV for prefixes
        (30, (10, 100), (5, 40), (10, 20)),
        (60, (10, 100), (5, 40), (20, 40)),
        (140, (10, 100), (5, 40), (100, 40)),
        (150, (10, 100), (5, 40), (100, 50)),
        (15, (10, 100), (5, 40), (10, 5)),  # exactly the minimums
        # target for experts: KV gets the rest
        (60, (10, 100, 30), (5, 40), (30, 30)),
        (60, (10, 25, 30), (5, 40), (25, 35)),  # not more than all experts need
        (60, (10, 100, 55), (5, 40), (55, 5)),
        # target for KV: experts get the rest
        (60, (10, 100), (5, 40, 20), (40, 20)),
        (60, (10, 30), (5, 40, 20), (30, 20)),
        (60, (10, 100), (5, 40, 50), (10, 50)),
        # targets for both
        (60, (10, 100, 20), (5, 40, 30), (20, 30)),
        (60, (10, 100, 20), (5, 40, 40), (20, 40)),
        # a tenant with target 0
        (60, (0, 100, 0), (5, 40), (0, 60)),
        (60, (10, 100), (0, 40, 0), (60, 0)),
        (60, (10, 100, 20), (0, 40, 0), (20, 0)),
    ],
)
def test_first_split(frames, experts, kv, expected):
    assert split(frames, experts, kv) == expected


def test_the_kv_cache_never_gets_more_than_its_cap():
    experts, kv = Wish(10, 100), Wish(5, 40, cap=45)
    assert [budget.target for budget in first_split(150 * MIB, MIB, experts, kv)] == [100, 45]


def test_a_budget_below_the_minimums_says_how_much_is_needed_and_why():
    with pytest.raises(BudgetTooSmallError) as info:
        split(14, (10, 100), (5, 40))
    error = info.value
    assert error.where == "memory.budget"
    assert "a budget of 14.0 MiB is" in error.what
    assert "at least 15.0 MiB is needed" in error.what
    assert "10.0 MiB for experts (one layer of 64 experts)" in error.what
    assert "5.0 MiB for the KV cache (one sequence of 8192 tokens)" in error.what
    assert "at least 15MiB," in error.fix
    assert "max-model-len" in error.fix


@pytest.mark.parametrize(
    ("experts", "kv", "field", "reason"),
    [
        ((10, 100, 9), (5, 40), "memory.experts.target", "one layer of 64 experts"),
        ((10, 100), (5, 40, 4), "memory.kv.target", "one sequence of 8192 tokens"),
        ((10, 100, 0), (5, 40), "memory.experts.target", "one layer of 64 experts"),
    ],
)
def test_a_target_below_its_minimum_names_field_value_and_reason(experts, kv, field, reason):
    with pytest.raises(ConfigError) as info:
        split(60, experts, kv)
    wish = experts if "experts" in field else kv
    assert info.value.where == field
    assert f"{shown(wish[2] * MIB)} is below the minimum of {wish[0]}.0 MiB (" in info.value.what
    assert reason in info.value.what
    assert "auto" in info.value.fix


@pytest.mark.parametrize(
    ("experts", "kv"),
    [((10, 100, 31), (5, 40, 30)), ((10, 100, 56), (5, 40)), ((10, 100), (5, 90, 51))],
)
def test_targets_beyond_the_budget_say_both_and_the_way_out(experts, kv):
    with pytest.raises(ConfigError) as info:
        split(60, experts, kv)
    assert not isinstance(info.value, BudgetTooSmallError)
    assert "need 61.0 MiB, but the budget has 60.0 MiB" in info.value.what
    assert info.value.where == "memory"
    assert "memory.experts.target" in info.value.fix
    assert "memory.kv.target" in info.value.fix


wish = st.builds(
    lambda low, more, target: (low, low + more, target),
    st.integers(0, 30),
    st.integers(0, 60),
    st.none() | st.integers(0, 60),
)


@given(st.integers(0, 120), wish, wish)
def test_a_split_never_exceeds_the_budget_and_gives_everyone_his_minimum(frames, experts, kv):
    try:
        to_experts, to_kv = split(frames, experts, kv)
    except ConfigError:
        return
    assert to_experts + to_kv <= frames
    assert experts[0] <= to_experts <= experts[1]
    assert kv[0] <= to_kv
    if kv[2] is not None:
        assert to_kv == kv[2]
    if experts[2] is not None:
        assert to_experts == min(experts[2], experts[1])
