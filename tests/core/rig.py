"""Rig of the core's tests: a small but complete memory manager with recognisable pages."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache

import numpy as np

import fluxmoe
from fluxmoe.core.arbitration.moves import MoveWorker
from fluxmoe.core.memory.host import CpuSubstrate
from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.core.memory.worker import WorkerMemory
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import EvictionPolicy, PageView, PrefetchPolicy
from fluxmoe.core.policy.watchdog import DEFAULT_LIMITS, Limits
from fluxmoe.core.transfer.engine import Copier, TransferEngine
from fluxmoe.core.transfer.host import HostCopier
from fluxmoe.core.types import Geometry, PageClass, Part
from fluxmoe.cuda.driver import CudaDriver
from fluxmoe.cuda.fake import FakeDriver
from fluxmoe.cuda.frames import CudaSubstrate
from fluxmoe.cuda.pinned import PinnedStore
from fluxmoe.cuda.streams import StreamCopier
from fluxmoe.errors import SubstrateError
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.policies.prefetch.none import NoPrefetch
from fluxmoe.stores.host import HostStore
from fluxmoe.testing.faults import FaultPlan, FaultyAddressedStore, FaultyStore

FRAME = 4096
#: Two blocks fill three frames.
KV_BLOCK = FRAME * 3 // 2
#: Neither part's size divides or is a multiple of the frame size, so slots straddle frames.
PAGE_CLASS = PageClass((Part("w13", 3000, 1500), Part("w2", 1700, 850)))


def content(page: int, part: int) -> np.ndarray:
    """Make the bytes of one part of a page, different from those of all other pages and parts."""
    nbytes = PAGE_CLASS.parts[part].nbytes
    data = ((np.arange(nbytes) * 7 + page * 31 + part * 101) % 251).astype(np.uint8)
    data[:2] = page, part
    return data


@cache
def contents(pages: int) -> list[np.ndarray]:
    """Make the bytes of the first ``pages`` pages: an array ``[pages, part bytes]`` per part."""
    parts = range(len(PAGE_CLASS.parts))
    return [np.stack([content(page, part) for page in range(pages)]) for part in parts]


def host_store(geometry: Geometry, cuda: CudaDriver | None = None) -> HostStore:
    store, experts = HostStore(geometry, PAGE_CLASS), geometry.experts_per_layer
    if cuda is not None:
        store = PinnedStore(cuda, geometry, PAGE_CLASS)
    try:
        for first in range(0, geometry.num_pages, experts):
            store.adopt([rows[first : first + experts] for rows in contents(geometry.num_pages)])
    except BaseException:
        store.close()
        raise
    return store


def rule_for(
    table: PageTable,
    eviction: EvictionPolicy | None = None,
    prefetch: PrefetchPolicy | None = None,
    **options: object,
) -> EventRule:
    """Make the event rule over a table, by default with LRU and without prefetch."""
    view = PageView(table)
    options = {"name": "under-test", **options}
    return EventRule(
        table,
        EvictionGuard(eviction or LeastRecentlyUsed(), view, **options),
        PrefetchGuard(prefetch or NoPrefetch(), view, **options),
    )


#: Location of the tests' memory: "host", or "cuda" followed by the timing of the streams.
GROUND = "host"


def host_only(test):
    """Mark a test that runs only on the host, because it concerns copy threads or host memory."""
    test.host_only = True
    return test


#: Driver call → kind of resource that a failure of this call inevitably leaves behind.
LEFT = {
    "cuStreamDestroy": "streams",
    "cuEventDestroy": "events",
    "cuCtxPopCurrent": "contexts",
    "cuMemFreeHost": "pinned",
    "cuCtxPushCurrent": "pinned",
}


class FakeCuda(CudaSubstrate):
    """Frames of a fake GPU, which checks that everything is returned."""

    def __init__(self, count, frame_bytes=FRAME, *, recycle=False, **options) -> None:
        # There is no more memory than the budget, so that unreturned memory is noticed at once.
        options.setdefault("pieces", count * frame_bytes // 4096)
        self.fake = FakeDriver(**options)
        with ExitStack() as undo:
            undo.callback(self.fake.close)
            self.cuda = CudaDriver(self.fake)
            undo.callback(self.cuda.close)
            super().__init__(self.cuda, count, frame_bytes, recycle=recycle)
            undo.pop_all()

    def close(self) -> None:
        super().close()
        self.cuda.close()
        left = Counter(self.fake.live())
        for site, kind in LEFT.items():  # resources that the driver refused to take back
            left[kind] -= self.fake.plan.struck[site]
        assert max(left.values(), default=0) <= 0, self.fake.live()
        self.fake.close()


def frames_of_memory(count: int) -> Substrate:
    """Make frames of the test's kind of memory."""
    if GROUND == "host":
        return CpuSubstrate(count, FRAME)
    return FakeCuda(count, pace=GROUND.removeprefix("cuda, "))


def fake_cuda(substrate: Substrate) -> FakeCuda | None:
    """Get the fake GPU under a substrate and its fault wrapper, if any."""
    substrate = getattr(substrate, "_substrate", substrate)
    return substrate if isinstance(substrate, FakeCuda) else None


def fails_late(commit, decommit):
    """Make a commit that maps its frames, which allocates their memory, before it fails."""

    def late(address, frames):
        commit(address, frames)
        decommit(address, len(frames))
        raise SubstrateError("injected fault")

    return late


class Rig:
    """All parts from the frames to the pager, as a backend puts them together."""

    def __init__(
        self,
        layers: int = 3,
        experts: int = 4,
        slots: Sequence[int] = (6,),
        *,
        reserved: Sequence[int] | None = None,
        bank_of: Sequence[int] | None = None,
        frames: int = 200,
        kv_blocks: int = 0,
        eviction: EvictionPolicy | None = None,
        prefetch: PrefetchPolicy | None = None,
        threads: int = 0,
        strict: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        substrate: Substrate | None = None,
        plan: FaultPlan | None = None,
        minimum: int | None = None,
    ) -> None:
        self.geometry = Geometry(layers, experts)
        reserved = list(slots if reserved is None else reserved)
        self.memory = WorkerMemory(substrate or frames_of_memory(frames), PAGE_CLASS, reserved)
        self.gpu = fake_cuda(self.memory.substrate)
        if self.gpu is None or threads:
            self.store = FaultyStore(host_store(self.geometry), plan)
        else:  # a GPU uses no copy threads; this covers pages copied through buffers
            store = host_store(self.geometry, self.gpu.cuda)
            self.store = FaultyAddressedStore(store, plan)
        with ExitStack() as undo:
            undo.callback(self.memory.close)
            undo.callback(self.store.close)
            if kv_blocks:
                self.memory.place_kv(KVLayout(kv_blocks, KV_BLOCK, FRAME), ())
            self.tenant = self.memory.experts
            for bank, count in enumerate(slots):
                self.tenant.resize(bank, count)
            self.table = PageTable(
                self.geometry, slots, reserved=max(reserved), bank_of=bank_of, minimum=minimum
            )
            self.rule = rule_for(self.table, eviction, prefetch, strict=strict, limits=limits)
            self.eviction, self.prefetch = self.rule.eviction, self.rule._prefetch
            self.rows = [self.tenant.rows(bank) for bank in range(len(slots))]
            self.threads = threads
            self.transfer = TransferEngine(self._copier(len(slots)), PAGE_CLASS.nbytes)
            self.pager = ExpertPager(self.rule, self.tenant, self.transfer)
            self.mover = MoveWorker(0, self.memory, self.pager, lambda: 0.0)
            undo.pop_all()

    def _copier(self, banks: int) -> Copier:
        if self.gpu is None:
            return HostCopier(self.store, self.rows, threads=self.threads)
        slots = [self.tenant.export(bank) for bank in range(banks)]
        return StreamCopier(self.gpu.cuda, self.store, slots, ahead=3 * PAGE_CLASS.nbytes)

    @property
    def resident(self) -> set[int]:
        return set(np.flatnonzero(self.table.resident).tolist())

    def acquire(self, layer: int, ids: Sequence[int]) -> list[int]:
        """Acquire experts, and check that the returned slots hold them."""
        wanted = np.asarray(ids, np.int32)
        slots = np.full(len(wanted), -7, np.int32)
        self.pager.acquire(layer, wanted, slots)
        for expert, slot in zip(ids, slots.tolist(), strict=True):
            if expert >= 0:
                self.assert_holds(self.table.bank(layer), slot, self.geometry.page(layer, expert))
            else:
                assert slot == 0
        return slots.tolist()

    def compute(self, layer: int, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Run a layer, in waves if necessary; check that each token's slots hold its experts.

        Returns:
            The tokens of each wave; one wave with all tokens if the event fits.
        """
        ids, waves = np.asarray(tokens, np.int32), []
        slots = np.full(ids.shape, -7, np.int32)

        def kernel(some: np.ndarray | None) -> None:
            waves.append(list(range(len(ids))) if some is None else some.tolist())
            bank = self.table.bank(layer)
            for token in waves[-1]:
                for expert, slot in zip(ids[token].tolist(), slots[token].tolist(), strict=True):
                    if expert >= 0:
                        self.assert_holds(bank, slot, self.geometry.page(layer, expert))
                    else:
                        assert slot == 0

        self.pager.run(layer, ids, slots, kernel)
        assert sorted(token for wave in waves for token in wave) == list(range(len(ids)))
        return waves

    def assert_holds(self, bank: int, slot: int, page: int) -> None:
        """Check a slot; on a GPU, at the time when a kernel launched now would read the slot."""
        assert 0 <= slot < self.table.slots[bank]
        parts = self.rows[bank]

        def look() -> None:
            for part, rows in enumerate(parts):
                np.testing.assert_array_equal(rows[slot], content(page, part), f"page {page}")

        self.look(look)

    def look(self, kernel: Callable[[], None]) -> None:
        """Inspect the slots; on a GPU, at the time when a kernel launched now would read them."""
        if self.gpu is None:
            kernel()
        else:
            self.gpu.fake.launch(kernel)

    def check(self) -> None:
        self.pager.check()
        self.memory.check()
        assert self.memory.committed_bytes <= self.memory.budget_bytes
        frames = self.memory.frames()
        kv = 0 if self.memory.kv is None else self.memory.kv.frames
        assert frames == {"experts": self.tenant.frames, "kv": kv}
        assert self.memory.committed_bytes == sum(frames.values()) * FRAME

    def close(self) -> None:
        self.rows = []
        with ExitStack() as each:  # runs all callbacks even if one fails
            each.callback(self.memory.close)
            each.callback(self.store.close)
            each.callback(self.pager.close)


class Leaks:
    """A count of the resources that a run of the core could leak in this process."""

    def __init__(self) -> None:
        self._before = self._count()

    def found(self) -> dict[str, int]:
        """Count the resources that have been added since the beginning."""
        return {kind: count - self._before[kind] for kind, count in self._count().items()}

    def assert_none(self) -> None:
        # Resources of earlier tests may end meanwhile.
        assert max(self.found().values()) <= 0, self.found()

    @staticmethod
    def _count() -> dict[str, int]:
        with open("/proc/self/maps") as maps:
            mappings = sum("memfd:fluxmoe" in line for line in maps)
        threads = sum(t.name.startswith("fluxmoe-copy") for t in threading.enumerate())
        return {"descriptors": len(memfds()), "mappings": mappings, "threads": threads}


#: Memory files, by inode, of engines that other test files have left in this process.
STRANGERS: set[int] = set()


def memfds(name: str = "fluxmoe") -> list[int]:
    """List the descriptors of the substrate's memory files, without those of other test files."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor that lists the folder
            ours = f"memfd:{name}" in os.readlink(f"/proc/self/fd/{fd}")
            if ours and os.stat(f"/proc/self/fd/{fd}").st_ino not in STRANGERS:
                found.append(int(fd))
    return found


class Quadratic(fluxmoe.EvictionPolicy):
    """A plugin author's numpy policy: an arbitrary function of the view."""

    def score(self, view, pages):
        return view.last_use[pages] + 3 * view.use_count[pages] ** 2 - pages % 3


class HighestPages(fluxmoe.EvictionPolicy):
    """A policy that selects instead of scoring."""

    def select(self, view, pages, n):
        return pages[::-1][:n]


class Kernel(fluxmoe.EvictionPolicy):
    """A policy that consists only of its kernel."""

    @staticmethod
    def score_kernel(last_use, use_count, loaded_at, event, page):
        return use_count * 2.0 - (event - last_use) / 3.0 + loaded_at * 0.25 - page % 5


class StableKernel(Kernel):
    """A kernel whose scores change only with accesses and loads, so the host keeps the order."""

    stable_score = True

    @staticmethod
    def score_kernel(last_use, use_count, loaded_at, event, page):
        return use_count * 2.0 + last_use / 3.0 - loaded_at * 0.25 - page % 5
