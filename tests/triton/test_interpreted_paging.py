"""The event rule on the device compared with the core's, array by array, and gather with copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxmoe.core.paging.books import DIRTY, PROTECTED, UNUSED
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import EvictionPolicy, PageView
from fluxmoe.core.types import Geometry
from fluxmoe.cuda.kernels.paging import (
    EVICTIONS,
    HITS,
    MISSES,
    by_score,
    gather_pages,
    resolve_event,
    upload,
)
from fluxmoe.errors import UnsupportedError
from fluxmoe.policies.prefetch.none import NoPrefetch


class Fixed(EvictionPolicy):
    """A policy with scores from the test, in place of the table that a host would upload."""

    scores = np.zeros(0)

    def score(self, view, pages):
        return self.scores[pages]


def rule_of(layers: int, experts: int, slots: int) -> tuple[EventRule, Fixed]:
    table = PageTable(Geometry(layers, experts), [slots])
    view, policy = PageView(table), Fixed()
    guard = EvictionGuard(policy, view, name="fixed", strict=True)
    return EventRule(table, guard, PrefetchGuard(NoPrefetch(), view, name="none")), policy


def agree(rule: EventRule, device) -> None:
    books = rule.table.books
    for name in ("last_use", "use_count", "loaded_at", "slot_of", "num_free"):
        assert np.array_equal(getattr(device, name).numpy(), getattr(books, name)), name
    free = int(books.num_free[0])
    assert np.array_equal(device.free[:free].numpy(), books.free[0, :free])
    held = books.page_at[0] != -1
    assert np.array_equal(device.page_at.numpy()[held], books.page_at[0, held])
    ours = (PROTECTED | UNUSED) * np.ones_like(books.flags)
    assert np.array_equal(device.flags.numpy() & ours, books.flags & ours)
    assert int(device.event) == rule.table.event
    count = rule.table.counters()
    got = device.counts.tolist()
    assert got[HITS] == count.hits and got[MISSES] == count.misses
    assert got[EVICTIONS] == count.evictions


@pytest.mark.parametrize(
    ("layers", "experts", "slots", "top_k"),
    [(3, 8, 8, 2), (4, 16, 40, 4), (2, 60, 61, 8), (40, 32, 1100, 32), (1, 1, 1, 1)],
)
def test_events_are_the_cores(layers, experts, slots, top_k):
    rng = np.random.default_rng(layers)
    rule, policy = rule_of(layers, experts, slots)
    device = upload(rule.table.books, "cpu")
    for step in range(3 if slots > 1000 else 12):
        # There are many ties and infinities, and the dtype alternates from step to step.
        scores = rng.integers(-3, 3, layers * experts).astype([np.int64, np.float32][step % 2])
        if step % 2:
            scores[rng.random(len(scores)) < 0.1] = np.inf
            scores[rng.random(len(scores)) < 0.1] = -np.inf
        policy.scores = scores
        device.order.copy_(torch.from_numpy(by_score(scores)))
        for layer in range(layers):
            tokens = int(rng.integers(1, 5))
            ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
            ids = ids.astype(np.int32)
            ids[rng.random(tokens) < 0.2] = -1
            before = rule.table.books.slot_of.copy()
            rule.run(step, layer, ids.reshape(-1))
            resolve_event(device, layer, torch.from_numpy(ids))
            agree(rule, device)
            n = int(device.count)
            for load in rule.loads():
                assert np.array_equal(load.pages, device.missing[:n].numpy())
                assert np.array_equal(load.slots, device.slots[:n].numpy())
            gone = np.flatnonzero((before != -1) & (rule.table.books.slot_of == -1))
            short = int(np.sum(before != -1)) + n - int(np.sum(rule.table.books.slot_of != -1))
            assert sorted(device.victims[:short].tolist()) == gone.tolist()
    assert rule.table.counters().evictions > 0 or slots >= layers * experts


def test_prefetched_pages_are_given_up_last():
    rule, policy = rule_of(3, 4, 6)
    policy.scores = np.arange(12.0)
    rule.run(0, 0, np.arange(4, dtype=np.int32))
    rule.run(0, 1, np.array([0, 1], np.int32))
    books = rule.table.books
    for protected in ([0, 1], [0, 1, 2, 3]):  # the second leaves too few unprotected pages
        for page in range(12):
            books.flags[page] &= DIRTY
        books.flags[protected] |= PROTECTED | UNUSED
        device = upload(books, "cpu")
        policy.scores = np.arange(12.0)
        device.order.copy_(torch.from_numpy(by_score(policy.scores)))
        counted = rule.table.counters()
        device.counts.copy_(torch.tensor([counted.hits, counted.misses, counted.evictions]))
        ids = np.array([2, 0, 3], np.int32) if len(protected) == 2 else np.arange(4, dtype=np.int32)
        resident = books.slot_of[protected] != -1
        assert resident.any()
        rule.run(1, 2, ids)
        resolve_event(device, 2, torch.from_numpy(ids[None]))
        agree(rule, device)


def test_a_batch_of_padding_is_an_event_without_pages():
    rule, _ = rule_of(1, 4, 4)
    device = upload(rule.table.books, "cpu")
    ids = np.full((1, 3), -1, np.int32)
    rule.run(0, 0, ids.reshape(-1))
    resolve_event(device, 0, torch.from_numpy(ids))
    agree(rule, device)
    assert int(device.count) == 0


def test_more_ids_than_one_chunk():
    rule, _ = rule_of(1, 8, 8)
    device = upload(rule.table.books, "cpu")
    ids = np.full((700, 3), 1, np.int32)
    ids[-1, -1] = 7
    rule.run(0, 0, ids.reshape(-1))
    resolve_event(device, 0, torch.from_numpy(ids))
    agree(rule, device)
    assert device.missing[:2].tolist() == [1, 7]


def test_two_banks_are_refused():
    table = PageTable(Geometry(2, 4), [4, 4], bank_of=[0, 1])
    with pytest.raises(UnsupportedError, match="one bank"):
        upload(table.books, "cpu")


@pytest.mark.parametrize("shape", [(64, 64), (3, 5, 16), (4100, 4)])
def test_gathered_pages_are_copies(shape):
    generator = torch.Generator().manual_seed(1)
    host = [torch.randint(-(2**15), 2**15, shape, generator=generator).short() for _ in range(5)]
    addresses = torch.tensor([page.data_ptr() for page in host])
    arena = torch.zeros(4, *shape, dtype=torch.int16)
    pages = torch.tensor([4, 0, 2], dtype=torch.int32)
    slots = torch.tensor([1, 3, 0], dtype=torch.int32)
    gather_pages(addresses, pages, slots, torch.tensor([2], dtype=torch.int32), arena, programs=3)
    want = torch.zeros_like(arena)
    want[1], want[3] = host[4], host[0]
    assert torch.equal(arena, want)


def test_slots_that_cannot_be_gathered_are_refused():
    one = torch.zeros(1, dtype=torch.int32)
    for arena in (torch.zeros(2, 3), torch.zeros(8, 2, 4)[::2]):
        with pytest.raises(UnsupportedError, match="cannot gather"):
            gather_pages(one.long(), one, one, one, arena)
