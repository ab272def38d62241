"""Frames, tenants, table and pager in random use, compared with the rule in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fluxmoe.core.arbitration.messages import FreeKV, SetSlots, TakeKV
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.paging.books import LEAVING
from fluxmoe.errors import CapacityError, OutOfFramesError
from fluxmoe.policies.eviction.immediate import Immediate
from fluxmoe.policies.eviction.lfru import LeastFrequentlyRecentlyUsed
from fluxmoe.policies.eviction.lfu import LeastFrequentlyUsed
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.policies.eviction.next_use import NextUse
from fluxmoe.policies.prefetch.next_layer import NextLayer
from fluxmoe.policies.prefetch.none import NoPrefetch
from tests.core import reference, rig
from tests.core.rig import (
    FRAME,
    PAGE_CLASS,
    HighestPages,
    Kernel,
    Leaks,
    Quadratic,
    Rig,
    StableKernel,
)

POLICIES = {
    "lru": (LeastRecentlyUsed, reference.lru),
    "lfu": (LeastFrequentlyUsed, reference.lfu),
    "lfru": (LeastFrequentlyRecentlyUsed, reference.lfru),
    "immediate": (Immediate, reference.lru),
    "next-use": (NextUse, reference.next_use),
    "numpy": (Quadratic, reference.quadratic),
    "select": (HighestPages, reference.highest_pages),
    "kernel": (Kernel, reference.kernel),
    "stable-kernel": (StableKernel, reference.stable_kernel),
}


class CoreMachine(RuleBasedStateMachine):
    threads = 0
    ground = "host"

    @initialize(
        data=st.data(),
        layers=st.integers(1, 4),
        experts=st.integers(2, 6),
        banks=st.integers(1, 2),
        policy=st.sampled_from(sorted(POLICIES)),
        prefetch=st.sampled_from([None, 0, 1, 2]),
        width=st.sampled_from([0, 0, 1, 2]),
        spare=st.integers(0, 12),
    )
    def build(self, data, layers, experts, banks, policy, prefetch, width, spare):
        self.leaks = Leaks()
        rig.GROUND = self.ground
        self.layers, self.experts, self.banks = layers, experts, min(banks, layers)
        self.reserved = [layers * experts + 1] * self.banks
        #: Experts per token if events may run in waves, or 0; and the minimum number of slots.
        self.width, self.least = width, width or experts
        sizes = st.integers(self.least, self.reserved[0])
        slots = [data.draw(sizes, label="slots") for _ in range(self.banks)]
        bank_of = [layer * self.banks // layers for layer in range(layers)]
        make, key = POLICIES[policy]
        self.rig = Rig(
            layers,
            experts,
            slots,
            reserved=self.reserved,
            bank_of=bank_of,
            frames=sum(frames_for(PAGE_CLASS, count, FRAME) for count in slots) + spare,
            eviction=make(),
            prefetch={None: None, 0: NoPrefetch()}.get(prefetch, NextLayer(prefetch or 1)),
            threads=self.threads,
            kv_blocks=7,
            minimum=self.least,
        )
        self.model = reference.Reference(
            layers,
            experts,
            slots,
            bank_of,
            key,
            retain=policy != "immediate",
            ahead=prefetch or 0,
        )

    @rule(data=st.data(), layer=st.integers(0, 3))
    def acquire(self, data, layer):
        layer %= self.layers
        ids = data.draw(st.lists(st.integers(-1, self.experts - 1), max_size=12), label="ids")
        self.event(layer, ids)

    def event(self, layer, ids):
        if self.width:
            ids = ids[: len(ids) // self.width * self.width]
            self.rig.compute(layer, np.reshape(ids, (-1, self.width)).astype(int))
        else:
            self.rig.acquire(layer, ids)
        self.model.event(layer, ids, self.width)

    @rule(data=st.data(), rounds=st.integers(1, 3))
    def whole_step(self, data, rounds):
        seed = data.draw(st.integers(0, 2**16), label="seed")
        rng = np.random.default_rng(seed)
        for _ in range(rounds):
            for layer in range(self.layers):
                ids = rng.integers(-1, self.experts, rng.integers(0, 9)).tolist()
                self.event(layer, ids)

    @rule(data=st.data(), bank=st.integers(0, 1))
    def resize(self, data, bank):
        bank %= self.banks
        slots = data.draw(st.integers(self.least - 1, self.reserved[0] + 1), label="slots")
        rig, table = self.rig, self.rig.table
        before = (list(table.slots), rig.memory.frames(), rig.resident)
        needed = frames_for(PAGE_CLASS, slots, FRAME) - frames_for(
            PAGE_CLASS, table.slots[bank], FRAME
        )
        if not self.least <= slots <= self.reserved[0]:
            expected = CapacityError
        elif needed > rig.memory.pool.free:
            expected = OutOfFramesError
        else:
            rig.pager.resize(bank, slots)
            assert table.slots[bank] == rig.tenant.slots[bank] == slots
            self.model.resize(bank, slots)
            return
        with pytest.raises(expected):
            rig.pager.resize(bank, slots)
        assert (list(table.slots), rig.memory.frames(), rig.resident) == before

    @rule(data=st.data())
    def change_kv(self, data):
        kv = self.rig.memory.kv
        groups = st.sets(st.integers(0, kv.layout.groups - 1), max_size=5)
        freed, taken = data.draw(groups, label="free"), data.draw(groups, label="take")
        self.rig.mover.apply(FreeKV(tuple(freed)))
        before = set(np.flatnonzero(kv.committed).tolist())
        assert not before & freed
        if kv.layout.frames(taken - before) > self.rig.memory.pool.free:
            with pytest.raises(OutOfFramesError):
                self.rig.mover.apply(TakeKV(tuple(taken)))
            after = before
        else:
            self.rig.mover.apply(TakeKV(tuple(taken)))
            after = before | taken
        assert set(np.flatnonzero(kv.committed).tolist()) == after
        buffer = kv.buffer().reshape(kv.layout.blocks, -1)
        for group in range(kv.layout.groups):
            for block in kv.layout.blocks_of(group):
                expected = 0 if group in after - before else block if group in after else 0xFF
                assert np.all(buffer[block] == expected)
                if group in after:
                    buffer[block] = block

    @rule(data=st.data())
    def set_slots(self, data):
        """Resize all banks at once, as a move does: either all banks or none."""
        sizes = st.integers(self.least, self.reserved[0])
        slots = tuple(data.draw(sizes, label="slots") for _ in range(self.banks))
        rig, table = self.rig, self.rig.table
        before = list(table.slots)
        needed = [frames_for(PAGE_CLASS, count, FRAME) for count in (*slots, *before)]
        if sum(needed[: self.banks]) - sum(needed[self.banks :]) > rig.memory.pool.free:
            with pytest.raises(OutOfFramesError):
                self.rig.mover.apply(SetSlots(slots))
            assert table.slots == before
            after = before
            # The banks that shrank before the failure have lost pages.
        else:
            self.rig.mover.apply(SetSlots(slots))
            assert table.slots == list(slots)
            after = slots
        if not table.books.now[LEAVING]:  # a bank has changed, if only briefly
            self.model.release()
        for bank in sorted(range(self.banks), key=lambda bank: slots[bank] - before[bank]):
            if slots[bank] < before[bank]:
                self.model.resize(bank, slots[bank])
        for bank in range(self.banks):
            self.model.slots[bank] = after[bank]

    @rule()
    def reset(self):
        self.rig.pager.reset()
        self.model.reset()

    @invariant()
    @precondition(lambda self: hasattr(self, "rig"))
    def agrees(self):
        self.rig.check()
        counts = self.rig.table.counters()
        assert {name: getattr(counts, name) for name in self.model.counts} == self.model.counts
        assert self.rig.resident == self.model.resident
        transfer = self.rig.transfer
        assert transfer.bytes_demand == (counts.loads_demand + counts.reloads) * PAGE_CLASS.nbytes
        assert transfer.bytes_prefetch == counts.loads_prefetch * PAGE_CLASS.nbytes

    @invariant()
    @precondition(lambda self: hasattr(self, "rig") and self.threads == 0)
    def every_resident_page_is_in_its_slot(self):
        table = self.rig.table
        for page in self.rig.resident:
            bank, slot = table.bank(page // self.experts), int(table.books.slot_of[page])
            if (bank, slot) not in self.rig.transfer._queued:  # otherwise, the copy is pending
                self.rig.assert_holds(bank, slot, page)

    def teardown(self):
        if hasattr(self, "rig"):
            pool = self.rig.memory.pool
            self.rig.close()
            rig.GROUND = "host"
            assert pool.free == pool.count
            self.leaks.assert_none()


class ThreadedCoreMachine(CoreMachine):
    threads = 1


class GpuCoreMachine(CoreMachine):
    ground = "cuda, random"


GpuCoreMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=25)
CoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=25)
ThreadedCoreMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=25)
TestCore = CoreMachine.TestCase
TestGpuCore = GpuCoreMachine.TestCase
TestThreadedCore = ThreadedCoreMachine.TestCase


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_long_run_agrees_with_the_rule_in_plain_python(policy, threads):
    make, key = POLICIES[policy]
    layers, experts = 5, 12
    rig = Rig(layers, experts, (20,), eviction=make(), prefetch=NextLayer(2), threads=threads)
    model = reference.Reference(
        layers, experts, (20,), [0] * layers, key, retain=policy != "immediate", ahead=2
    )
    rng = np.random.default_rng(7)
    for event in range(300):
        ids = np.minimum(rng.geometric(0.25, 6) - 1, experts - 1).tolist()
        rig.acquire(event % layers, ids)
        model.event(event % layers, ids)
        assert rig.resident == model.resident, f"event {event}"
    assert rig.table.counters().evictions == model.counts["evictions"]
    rig.close()
