"""The waves of an event that needs more pages than its bank has slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.paging.waves import Waves, most_loads, partition
from fluxmoe.core.types import Geometry
from tests.core.reference import in_waves
from tests.core.rig import rule_for


def flat(tokens) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([expert for token in tokens for expert in token], np.int64)
    starts = np.zeros(len(ids), np.bool_)
    starts[np.cumsum([0, *map(len, tokens[:-1])])] = True
    return ids, starts


def waves_of(tokens, experts: int, slots: int) -> list[list[int]]:
    """Divide the tokens into waves, and check the waves' experts."""
    waves = partition(*flat(tokens), experts, slots)
    found = [part.tolist() for part in np.split(waves.order, waves.ends)[:-1]]
    for wave, wanted in zip(found, np.split(waves.experts, waves.expert_ends)[:-1], strict=True):
        assert sorted({e for token in wave for e in tokens[token] if e >= 0}) == sorted(wanted)
        assert len(wanted) <= slots
    assert sorted(waves.order) == list(range(len(tokens)))
    return found


def loads(tokens, experts: int, slots: int, resident=()) -> tuple[int, int]:
    """Run the event in a bank that holds ``resident``; count its misses and reloads."""
    table = PageTable(Geometry(2, experts), [slots], minimum=1)
    rule = rule_for(table)
    rule.run(0, 0, np.array(resident, np.int64))
    before = table.counters()
    rule.run(0, 0, *flat(tokens)[:1], starts=flat(tokens)[1])
    table.check()
    after = table.counters()
    return after.misses - before.misses, after.reloads - before.reloads


@st.composite
def events(draw):
    """Draw (tokens, experts, slots), skewed so that some experts are used by many tokens."""
    experts, width = draw(st.integers(2, 70)), draw(st.integers(1, 5))
    width = min(width, experts)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    skew = draw(st.sampled_from([0.0, 0.7, 2.0]))
    chances = (1 / np.arange(1, experts + 1) ** skew)[rng.permutation(experts)]
    tokens = [
        rng.choice(experts, width, replace=False, p=chances / chances.sum()).tolist()
        for _ in range(draw(st.integers(1, 80)))
    ]
    for token in tokens:
        if rng.random() < draw(st.sampled_from([0.0, 0.1])):
            token[rng.integers(width) :] = [-1] * (width - rng.integers(width))
            del token[width:]
        if rng.random() < 0.1:
            token[0] = token[-1]
    return tokens, experts, draw(st.integers(width, max(width, experts - 1)))


@settings(max_examples=300)
@given(events())
def test_the_waves_are_those_of_the_rule_in_plain_python(event):
    tokens, experts, slots = event
    found = waves_of(tokens, experts, slots)
    expected = in_waves(tokens, slots)
    wanted = [[{e for e in tokens[t] if e >= 0} for t in wave] for wave in found]
    assert wanted == expected


@settings(max_examples=300)
@given(events(), st.sets(st.integers(0, 69)))
def test_an_event_loads_no_more_than_the_bound(event, resident):
    tokens, experts, slots = event
    sets = [{e for e in token if e >= 0} for token in tokens]
    pages, pairs, top_k = len(set().union(*sets)), sum(map(len, sets)), max(map(len, sets))
    start = [e for e in resident if e < experts][:slots]
    for had in ((), start):
        misses, reloads = loads(tokens, experts, slots, had)
        assert misses == len(set().union(*sets) - set(had))
        assert 0 <= reloads <= most_loads(pairs, pages, top_k, slots) - misses
        assert not (pages <= slots and reloads)


def test_the_bound_is_reached_if_no_two_tokens_share_experts():
    tokens = [[0, 1], [2, 3], [4, 5]]
    assert loads(tokens, 6, 2) == (6, 0)
    assert most_loads(6, 6, 2, 2) == 6


def test_padding_changes_no_wave():
    rng = np.random.default_rng(0)
    tokens = [rng.choice(16, 3, replace=False).tolist() for _ in range(30)]
    padded = [each for token in tokens for each in (token, [-1, -1, -1])]
    plain = partition(*flat(tokens), 16, 5)
    found = partition(*flat(padded), 16, 5)
    assert found.experts.tolist() == plain.experts.tolist()
    assert found.expert_ends.tolist() == plain.expert_ends.tolist()
    assert [token // 2 for token in found.order if token % 2 == 0] == plain.order.tolist()


def test_all_tokens_whose_pages_are_present_run_before_another_page_is_loaded():
    tokens = [[0, 1], [2, 3], [0, 1], [4, 5], [1, 0], [2, 1]]
    assert waves_of(tokens, 6, 3) == [[0, 2, 4, 5], [1], [3]]


def test_a_token_is_never_split():
    nothing = partition(*flat([[0, 1, 2], [3, 4]]), 5, 2)
    assert all(not len(part) for part in nothing)


@pytest.mark.parametrize(("experts", "top_k", "most"), [(16, 4, 32), (64, 8, 36), (128, 8, 22)])
def test_a_chunk_of_512_tokens_reads_much_less_than_its_tokens_one_by_one(experts, top_k, most):
    """The bound holds even with the minimum number of slots and uniform routing."""
    rng = np.random.default_rng(1)
    tokens = [rng.choice(experts, top_k, replace=False).tolist() for _ in range(512)]
    for slots, share in ((top_k, 1.0), (2 * top_k, 0.75), (experts // 2, 0.35)):
        assert sum(loads(tokens, experts, slots)) <= most * experts * share


def test_waves_is_a_tuple_of_whole_arrays():
    waves = partition(*flat([[1], [0]]), 2, 1)
    assert isinstance(waves, Waves)
    assert [part.tolist() for part in waves] == [[0, 1], [1, 2], [1, 0], [1, 2]]
