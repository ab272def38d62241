"""One run of the fuzzer: a memory manager and a series of operations, both drawn from one seed.

The series does not depend on its length, so a run of fewer operations is a prefix of a longer one.
Failures can therefore be replayed, and ``shrink`` can bisect for the shortest failing prefix.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fluxmoe.core.arbitration.messages import FreeKV, TakeKV
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.host import CpuSubstrate
from fluxmoe.core.policy.watchdog import Limits
from fluxmoe.errors import (
    CapacityError,
    FluxMoEError,
    OutOfFramesError,
    PolicyFaultError,
    StoreError,
    SubstrateError,
)
from fluxmoe.policies.prefetch.next_layer import NextLayer
from fluxmoe.testing.faults import FaultPlan, FaultySubstrate
from tests.core.rig import FRAME, PAGE_CLASS, FakeCuda, Rig, contents
from tests.fuzz.mappings import assert_mapped
from tests.fuzz.model import Model
from tests.fuzz.policies import EVICTION, Wild, faulty

MAX_LAYERS, MAX_EXPERTS = 6, 32
#: Fault sites that refuse memory.
MEMORY = (
    *("reserve", "commit", "decommit", "release", "mmap", "fallocate", "frames"),
    *("cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap"),
    *("cuMemRelease", "cuMemAddressFree", "cuMemsetD8Async", "cuCtxSynchronize"),
    "cuStreamSynchronize",
)
#: Driver calls needed to move a page to another slot.
MOVING = {
    *("cuMemcpyDtoDAsync", "cuEventCreate", "cuEventRecord", "cuEventQuery"),
    "cuEventElapsedTime",
}
MOSTLY_EVENTS = {"event": 300, "resize": 6, "kv": 4, "reset": 0.3, "wrong": 1, "verify": 3}
MOVING_MEMORY = {"event": 60, "resize": 20, "kv": 8, "reset": 1, "wrong": 1}


class Run:
    """The core and its model side by side; any difference is an AssertionError.

    Args:
        seed: Seed of the layout, the policies and the operations.
        plan: Faults to inject; if None, stores, substrates and policies fail at random.
        threads: Number of copy threads; if None, drawn.
        wrap: Function applied to each drawn policy, which returns the policy to use.
        kinds: Relative frequency of each call.
        gpu: True to use a fake GPU, each of whose driver calls is a site with the name of the call.

    Attributes:
        operations: Page accesses (one distinct expert of one event) and other calls so far.
        calls: Number of times each call was made.
        errors: Counts of the errors that the core raised because of a fault, by code.
    """

    def __init__(
        self,
        seed: int,
        *,
        plan: FaultPlan | None = None,
        threads: int | None = None,
        wrap: Callable[[Any], Any] = lambda policy: policy,
        kinds: Mapping[str, float] = MOSTLY_EVENTS,
        gpu: bool = False,
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.kinds = kinds
        self.operations = 0
        self.calls: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        faults = plan is None
        layers, experts = rng.randint(1, MAX_LAYERS), rng.randint(2, MAX_EXPERTS)
        banks = rng.choice([1, 1, 1, min(2, layers), min(3, layers)])
        self.reserved = [rng.randint(experts, layers * experts + 1) for _ in range(banks)]
        #: Experts per token if banks may be smaller than a layer (then events run in waves), or 0.
        self.width = random.Random(f"{seed} waves").choice([0, 0, 1, min(3, experts)])
        self.least = self.width or experts
        slots = [rng.randint(self.least, reserved) for reserved in self.reserved]
        policy = rng.choice(sorted(EVICTION))
        eviction = EVICTION[policy].make()
        ahead, prefetch = rng.choice(
            [(0, None), (0, None), (1, NextLayer()), (2, NextLayer(2)), (None, Wild())]
        )
        self.faulty = []
        if faults and rng.random() < 0.3 and policy != "queue":  # the queue's records must be exact
            self.faulty.append(faulty(eviction, rng.choice([3, 30, 300])))
            if prefetch is not None:
                self.faulty.append(faulty(prefetch, rng.choice([3, 30, 300])))
        #: Frequencies of failed reads, and of failed system calls.
        self.unreadable, self.refusing = (
            (rng.choice([0, 0, 0.02, 0.3]), rng.choice([0, 0.5])) if faults else (0, 0)
        )
        self.strict = rng.random() < 0.3
        self.plan = plan or FaultPlan()
        frames = sum(frames_for(PAGE_CLASS, count, FRAME) for count in slots) + rng.randint(0, 40)
        ground = self._gpu(frames, seed) if gpu else CpuSubstrate(frames, FRAME)
        self.rig = Rig(
            layers,
            experts,
            slots,
            reserved=self.reserved,
            kv_blocks=rng.randint(1, 9),
            bank_of=[layer * banks // layers for layer in range(layers)],
            frames=frames,
            eviction=wrap(eviction),
            prefetch=wrap(prefetch) if prefetch else None,
            threads=rng.choice([0, 0, 0, 1, 3]) if threads is None else threads,
            strict=self.strict,
            limits=Limits(strikes=rng.choice([4, 1000, 10**9])),
            substrate=FaultySubstrate(ground, self.plan),
            plan=self.plan,
            minimum=self.least,
        )
        take = self.rig.memory.pool.take
        self.rig.memory.pool.take = lambda *args: (self.plan.reach("frames"), take(*args))[1]
        self.probes = [_probes(bank) for bank in self.rig.rows]
        self.model = Model(self.rig, EVICTION[policy], ahead)
        self.next_layer = 0
        #: Committed KV group → the byte that fills the group.
        self.stamps: dict[int, int] = {}
        self.name = (
            f"{policy}{' faulty' if self.faulty else ''}, {layers}×{experts}, slots {slots}, "
            f"prefetch {type(prefetch).__name__}, {self.rig.threads} threads"
        )

    def _gpu(self, frames: int, seed: int) -> FakeCuda:
        """Make a fake GPU with random stream timing, which may or may not keep released frames."""
        rng = random.Random(seed)
        pace = rng.choice(["at once", "kernels", "copies", "random"])
        recycle = rng.random() < 0.5
        return FakeCuda(frames, pace=pace, recycle=recycle, seed=seed, plan=self.plan)

    def go(self, operations: int) -> None:
        """Run until ``operations`` operations have been made, then check everything."""
        while self.operations < operations:
            self.step()
        self.verify()

    def step(self) -> None:
        """Make one call and compare all its observable effects."""
        kind = self.rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        self.calls[kind] += 1
        self.operations += getattr(self, kind)() or 1

    # --- the calls -------------------------------------------------------------------------------

    def event(self) -> int:
        rng, rig = self.rng, self.rig
        if self.unreadable and rng.random() < 0.2:
            pages = range(rig.geometry.num_pages)
            rig.store.broken = {page for page in pages if rng.random() < self.unreadable / 4}
        layer = self.next_layer if rng.random() < 0.9 else rng.randrange(self.model.layers)
        self.next_layer = (layer + 1) % self.model.layers
        ids = self._ids()
        if self.width:
            ids = ids[: len(ids) // self.width * self.width]
        slots = np.full(len(ids), -7, np.int32)
        try:
            if self.width:
                self._compute(layer, ids.reshape(-1, self.width), slots.reshape(-1, self.width))
            else:
                rig.pager.acquire(layer, ids, slots)
        except (StoreError, PolicyFaultError) as error:
            assert self.strict or not isinstance(error, PolicyFaultError)
            self.errors[error.code] += 1
            self.model.open(layer, ids.tolist())
            self.model.follow_failure()
            self._books()
        else:
            self.model.event(layer, ids.tolist(), self.width)
            self._compare(layer, ids, slots)
        return len(self.model.own)

    def _compute(self, layer: int, ids: np.ndarray, slots: np.ndarray) -> None:
        """Run a layer, in waves if necessary, and check the bytes that each wave reads."""
        seen = []

        def kernel(tokens: np.ndarray | None) -> None:
            some = slice(None) if tokens is None else tokens
            seen.extend(range(len(ids)) if tokens is None else tokens.tolist())
            self._assert_read(layer, ids[some].ravel(), slots[some].ravel())

        self.rig.pager.run(layer, ids, slots, kernel)
        assert sorted(seen) == list(range(len(ids)))

    def _ids(self) -> np.ndarray:
        rng, experts = self.rng, self.model.experts
        kind = rng.randrange(8)
        if kind == 0:
            ids = list(range(experts))
        elif kind == 1:
            ids = rng.sample(range(experts), rng.randint(0, experts))
        else:
            skew = rng.choice([0.1, 0.3, 1.0])
            ids = [min(int(rng.expovariate(skew)), experts - 1) for _ in range(rng.randint(0, 32))]
        if rng.random() < 0.2:
            ids += [-1] * rng.randint(1, 4)
        return np.array(ids, rng.choice([np.int32, np.int64]))

    def _compare(self, layer: int, ids: np.ndarray, slots: np.ndarray) -> None:
        """Compare the event's books, the resident pages, and the bytes that kernels will read."""
        rig, model, b = self.rig, self.model, self.rig.table.books
        own = model.own
        assert b.pages[: len(own)].tolist() == own
        assert np.array(own, np.int64)[~b.hit[: len(own)]].tolist() == model.misses
        assert rig.resident == model.resident
        if not self.width:
            self._assert_read(layer, ids, slots)

    def _assert_read(self, layer: int, ids: np.ndarray, slots: np.ndarray) -> None:
        """Check that slots hold the experts ``ids`` now."""
        rig, model, real = self.rig, self.model, ids >= 0
        assert not slots[~real].any()
        bank, pages = rig.table.bank(layer), layer * model.experts + ids[real]
        right = _probes(contents(rig.geometry.num_pages))
        self._assert_hold(bank, slots[real], self.probes[bank], pages, right)

    def _assert_hold(self, bank: int, slots, parts, pages, contents) -> None:
        assert np.all((slots >= 0) & (slots < self.rig.table.slots[bank]))

        def look() -> None:
            for rows, right in zip(parts, contents, strict=True):
                assert np.array_equal(rows[slots], right[pages]), "a slot holds wrong bytes"

        self.rig.look(look)

    def wrong(self) -> None:
        """Make an invalid call, which must raise an error without other effects."""
        layer, expert = self.rng.choice(
            [(0, self.model.experts), (self.model.layers, 0), (-1, 0), (10**9, 0), (0, 10**9)]
        )
        try:
            self.rig.pager.acquire(layer, np.array([expert]), np.zeros(1, np.int32))
        except IndexError:
            assert self.rig.resident == self.model.resident
        else:
            raise AssertionError("an expert that does not exist was acquired")

    def resize(self) -> None:
        rng, rig, table = self.rng, self.rig, self.rig.table
        bank = rng.randrange(table.num_banks)
        slots = rng.randint(self.least - 1, self.reserved[bank] + 1)
        before = table.slots[bank]
        # Frames that the system refused to unmap when the bank shrank are still mapped.
        needed = sum(
            max(0, -(-slots * part.nbytes // FRAME) - arena.committed)
            for part, arena in zip(PAGE_CLASS.parts, rig.tenant._arenas[bank], strict=True)
        )
        on_their_way = {
            int(table.books.page_at[key]) for key in rig.transfer._queued if key[0] == bank
        }
        room, refused = rig.memory.pool.free, self._refused()
        outcome = self._while_refusing(rig.pager.resize, bank, slots)
        if not self.least <= slots <= self.reserved[bank]:
            assert outcome is CapacityError
        elif outcome is PolicyFaultError:
            assert self.strict
            assert slots < before
            self.errors[outcome.code] += 1
            self.model.release()
            self.model.follow_failure()
        elif self._refused() > refused:
            assert outcome in (SubstrateError, OutOfFramesError)
            self.errors[outcome.code] += 1
            if slots < before:
                self.model.resize(bank, slots)
                self.model.slots[bank] = before
        else:
            assert outcome is (OutOfFramesError if needed > room else None)
            if outcome is None:
                self.model.resize(bank, slots)
        if slots < before:
            lost = self.model.resident - rig.resident
            assert lost <= on_their_way or self.plan.struck.keys() & MOVING
            assert not lost or rig.store.broken or self.plan.struck
            self.model.lose(lost)
        self._books()

    def kv(self) -> None:
        """Release some KV groups and commit others."""
        rng, rig, kv = self.rng, self.rig, self.rig.memory.kv
        groups = range(kv.layout.groups)
        for action in (FreeKV, TakeKV):
            wanted = {group for group in groups if rng.random() < 0.3}
            before, room = set(self.stamps), rig.memory.pool.free
            refused = self._refused()
            outcome = self._while_refusing(rig.mover.apply, action(tuple(wanted)))
            after = set(np.flatnonzero(kv.committed).tolist())
            if self._refused() > refused:
                assert outcome in (SubstrateError, OutOfFramesError)
                self.errors[outcome.code] += 1
                # At most one group remains, because the system refused to unmap it.
                target = before if action is TakeKV else before - wanted
                assert target <= after <= before | wanted
                assert len(after - target) <= 1
            elif action is TakeKV and kv.layout.frames(wanted - before) > room:
                assert outcome is OutOfFramesError
                assert after == before
            else:
                assert outcome is None
                assert after == (before | wanted if action is TakeKV else before - wanted)
            self._stamp(before, after)

    def _stamp(self, before: set[int], after: set[int]) -> None:
        """Check that new groups read as zero, and write distinct data to each."""
        layout, buffer = self.rig.memory.kv.layout, self._kv_blocks()
        for group in before - after:
            del self.stamps[group]
        for group in after - before:
            self.stamps[group] = self.rng.randint(1, 254)
            for block in layout.blocks_of(group):
                # Memory that the system refused to take back keeps its content.
                assert self._refused() or not buffer[block].any()
                buffer[block] = self.stamps[group]

    def _kv_blocks(self) -> np.ndarray:
        kv = self.rig.memory.kv
        return kv.buffer().reshape(kv.layout.blocks, -1)

    def reset(self) -> None:
        self.rig.pager.reset()
        self.model.reset()
        self.next_layer = 0
        for notes in self.model.failed.values():
            assert not notes

    def _refused(self) -> int:
        """Count the memory errors so far. (Copy threads may also fail outside a call.)"""
        return sum(self.plan.struck[site] for site in MEMORY)

    def _while_refusing(self, call, *args) -> type[FluxMoEError] | None:
        """Make a call, possibly while memory is refused; return the class of the error, if any."""
        refuse = self.rng.random() < self.refusing
        if refuse:
            site = self.rng.choice(["commit", "decommit", "release"])
            self.plan.arm(site, SubstrateError("injected fault"), nth=self.rng.randint(1, 2))
        outcome = self._try(call, *args)
        if refuse:
            self.plan.disarm()
        return outcome

    def _try(self, call, *args) -> type[FluxMoEError] | None:
        try:
            call(*args)
        except FluxMoEError as error:
            return type(error)
        return None

    # --- complete checks -------------------------------------------------------------------------

    def verify(self) -> None:
        """Check books, arrays, counters, mappings, and bytes of resident pages and KV groups."""
        self._books()
        self.model.assert_same_books()
        rig, table = self.rig, self.rig.table
        kv, blocks = rig.memory.kv, self._kv_blocks()
        arenas = [kv._arena, *(arena for bank in rig.tenant._arenas for arena in bank)]
        assert_mapped(arenas, rig.gpu)
        for group in range(kv.layout.groups):
            for block in kv.layout.blocks_of(group):
                assert np.all(blocks[block] == self.stamps.get(group, 0xFF))
        for bank in range(table.num_banks):
            held = np.flatnonzero(table.books.page_at[bank] >= 0)
            # A prefetched page that has not been needed yet may still be in flight.
            here = [(bank, slot) not in rig.transfer._queued for slot in held.tolist()]
            slots = held[np.array(here, bool)]
            pages, right = table.books.page_at[bank, slots], contents(rig.geometry.num_pages)
            self._assert_hold(bank, slots, rig.rows[bank], pages, right)
        if not self.strict:
            raised = sum(policy.raised for policy in self.faulty)
            raised += sum(n for site, n in self.plan.struck.items() if site.startswith("policy"))
            assert rig.eviction.faults + rig.prefetch.faults == raised

    def _books(self) -> None:
        rig = self.rig
        rig.check()
        needed = sum(frames_for(PAGE_CLASS, slots, FRAME) for slots in rig.table.slots)
        assert rig.tenant.frames == needed or (self._refused() and rig.tenant.frames > needed)
        assert rig.resident == self.model.resident
        assert self.rig.table.slots == self.model.slots

    def close(self) -> None:
        """Release everything."""
        pool, struck = self.rig.memory.pool, self.plan.struck.total()
        error = self._try(self.rig.close)
        if error is not None:
            assert self.plan.struck.total() > struck, error
            self.errors[error.code] += 1
            if self.rig.gpu is not None:  # retry releases that were refused
                self.rig.gpu.close()
        assert pool.free == pool.count

    @property
    def faults(self) -> Counter[str]:
        """Number of random failures by site; of failed reads, only those that raised an error."""
        counts = Counter(self.plan.struck)
        counts["read"] = self.errors[StoreError.code]
        counts["policy"] = sum(policy.raised for policy in self.faulty)
        return +counts


def _probes(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Sample enough bytes of each row to distinguish pages after every event."""
    return [rows[:, :: (rows.shape[1] - 1) // 20] for rows in parts]
