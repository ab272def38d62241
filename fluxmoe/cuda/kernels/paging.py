"""The event rule on the device, and the gathering of missing pages from host memory.

These kernels are for steps that run without the host (full CUDA graphs): once per step, the host
uploads the eviction order of the pages, made from any policy's scores. One small kernel per layer
then resolves hits, chooses victims and assigns slots, and another kernel copies the missing pages.
The first kernel implements points 1–5 of the event rule (docs/concepts/event-rule.md) for one bank,
without policy hooks; tests compare every array with the core's after every event. Releasing
(``retain``) and prefetching stay on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fluxmoe.core.paging.books import ABSENT, EVENT, PROTECTED, UNUSED, Books
from fluxmoe.cuda.kernels.language import tl, triton
from fluxmoe.errors import UnsupportedError

_PROTECTED, _UNUSED = tl.constexpr(PROTECTED), tl.constexpr(UNUSED)
#: Number of pages (when choosing victims) or ids (when finding hits) processed at once.
_CHUNK = tl.constexpr(1024)
#: Indices into ``DeviceBooks.counts``.
HITS, MISSES, EVICTIONS = range(3)


class DeviceBooks(NamedTuple):
    """The books of a page table on the device, as in ``core.paging.books``.

    P is the number of pages, M that of slots, and E that of experts per layer. ``order`` contains
    the pages by score. ``missing`` and ``slots`` contain the pages that the current event loads and
    their slots; the first ``count`` are valid. ``victims`` contains the event's victims.
    """

    last_use: torch.Tensor  # int64 [P]
    use_count: torch.Tensor  # int64 [P]
    loaded_at: torch.Tensor  # int64 [P]
    slot_of: torch.Tensor  # int32 [P]
    flags: torch.Tensor  # uint8 [P]
    page_at: torch.Tensor  # int64 [M]
    free: torch.Tensor  # int32 [M]
    num_free: torch.Tensor  # int64 [1]
    order: torch.Tensor  # int32 [P]
    event: torch.Tensor  # int64 [1]
    counts: torch.Tensor  # int64 [3]
    missing: torch.Tensor  # int32 [E]
    slots: torch.Tensor  # int32 [E]
    victims: torch.Tensor  # int32 [E]
    count: torch.Tensor  # int32 [1]


def upload(books: Books, device: torch.device | str) -> DeviceBooks:
    """Copy the books to the device between two events.

    Raises:
        UnsupportedError: The table has more than one bank.
    """
    if len(books.num_slots) != 1:
        raise UnsupportedError("the event rule on a device supports only one bank of slots")

    def put(array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device)

    def room() -> torch.Tensor:
        return torch.full((books.tokens.size,), ABSENT, dtype=torch.int32, device=device)

    return DeviceBooks(
        last_use=put(books.last_use),
        use_count=put(books.use_count),
        loaded_at=put(books.loaded_at),
        slot_of=put(books.slot_of),
        flags=put(books.flags),
        page_at=put(books.page_at[0]),
        free=put(books.free[0]),
        num_free=put(books.num_free),
        order=put(np.arange(books.slot_of.size, dtype=np.int32)),
        event=put(books.now[EVENT : EVENT + 1]),
        counts=torch.zeros(3, dtype=torch.int64, device=device),
        missing=room(),
        slots=room(),
        victims=room(),
        count=torch.zeros(1, dtype=torch.int32, device=device),
    )


def by_score(scores: npt.NDArray[np.generic]) -> npt.NDArray[np.int32]:
    """Return pages in eviction order: lowest score first, ties by lowest page id (rule, point 4).

    ``scores`` ``[P]`` has any integer or float dtype and contains no NaN.
    """
    return np.argsort(scores, kind="stable").astype(np.int32)


def resolve_event(books: DeviceBooks, layer: int, ids: torch.Tensor) -> None:
    """Run one event: find hits, choose victims and assign slots to the missing pages.

    Args:
        books: Updated in place; ``missing``, ``slots`` and ``count`` give the copies to make.
        layer: MoE layer, from 0.
        ids: ``[tokens, top_k]`` int32 on the device; negative ids are padding.
    """
    experts = books.missing.numel()
    resolve_event_kernel[(1,)](
        *books, ids, ids.numel(), layer * experts, books.slot_of.numel(),
        EXPERTS=experts, WIDTH=triton.next_power_of_2(experts), num_warps=8, maxnreg=128,
    )  # fmt: skip


@triton.jit
def resolve_event_kernel(
    last_use, use_count, loaded_at, slot_of, flags, page_at, free, num_free, order, event, counts,
    missing, slots, victims, count, ids, num_ids, first, pages,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Run a whole event in one thread block; see ``resolve_event``."""
    expert = tl.arange(0, WIDTH)
    routed = tl.zeros((WIDTH,), tl.int32)
    for at in range(0, num_ids, _CHUNK):
        where = at + tl.arange(0, _CHUNK)
        some = tl.load(ids + where, mask=where < num_ids, other=-1)
        routed += tl.histogram(tl.maximum(some, 0), WIDTH, mask=(some >= 0) & (some < EXPERTS))
    page = first + expert
    there = expert < EXPERTS
    asked = there & (routed > 0)
    slot = tl.load(slot_of + page, mask=there, other=0)
    miss = asked & (slot == -1)
    now = tl.load(event) + 1
    tl.store(last_use + page, tl.zeros_like(expert).to(tl.int64) + now, mask=asked)
    tl.store(use_count + page, tl.load(use_count + page, mask=asked, other=0) + 1, mask=asked)
    flag = tl.load(flags + page, mask=there, other=0) & (255 - _PROTECTED)
    tl.store(flags + page, tl.where(asked, flag & (255 - _UNUSED), flag), mask=there)

    misses = tl.sum(miss.to(tl.int32), 0)
    hits = tl.sum(asked.to(tl.int32), 0) - misses
    tl.store(counts, tl.load(counts) + hits)
    tl.store(counts + 1, tl.load(counts + 1) + misses)
    tl.store(count, misses)
    spare = tl.load(num_free).to(tl.int32)
    short = misses - spare
    found = 0
    tl.debug_barrier()  # choosing victims reads the values stored above
    for spared in tl.static_range(2):  # protected pages are evicted only if too few others are left
        at = 0
        while (found < short) & (at < pages):
            where = at + tl.arange(0, _CHUNK)
            each = tl.load(order + where, mask=where < pages, other=0)
            held = tl.load(slot_of + each, mask=where < pages, other=-1)
            bit = tl.load(flags + each, mask=where < pages, other=0) & _PROTECTED
            used = tl.load(last_use + each, mask=where < pages, other=0)
            good = (where < pages) & (held != -1) & (used != now) & ((bit != 0) == (spared == 1))
            place = found + tl.cumsum(good.to(tl.int32), 0) - 1
            good = good & (place < short)
            tl.store(victims + place, each, mask=good)
            tl.store(free + spare + place, held, mask=good)
            tl.store(slot_of + each, tl.full((_CHUNK,), -1, tl.int32), mask=good)
            tl.store(flags + each, tl.load(flags + each, mask=good, other=0) & 4, mask=good)
            found += tl.sum(good.to(tl.int32), 0)
            at += _CHUNK
        tl.debug_barrier()
    tl.store(counts + 2, tl.load(counts + 2) + found)

    rank = tl.cumsum(miss.to(tl.int32), 0) - 1
    given = tl.load(free + spare + found - 1 - rank, mask=miss, other=0)  # from the stack's top
    tl.store(slot_of + page, given, mask=miss)
    tl.store(page_at + given, page.to(tl.int64), mask=miss)
    tl.store(loaded_at + page, tl.zeros_like(expert).to(tl.int64) + now, mask=miss)
    tl.store(missing + rank, page, mask=miss)
    tl.store(slots + rank, given, mask=miss)
    # Values that all threads read may change only after a barrier, since some threads may lag.
    tl.store(num_free, (spare + found - misses).to(tl.int64))
    tl.store(event, now)


def gather_pages(
    addresses: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    arena: torch.Tensor,
    *,
    programs: int = 128,
) -> None:
    """Copy one part of each page into the page's slot, reading host memory from the device.

    Args:
        addresses: ``[P]`` int64, device address of each page's part, a multiple of 16. On CUDA, the
            memory is pinned and mapped.
        pages: ``[n]`` int32, page numbers, of which the first ``count`` are copied.
        slots: ``[n]`` int32, target slot of each page.
        count: ``[1]`` int32 on the device, at most n.
        arena: ``[slots, …]``, dense; the size of a slot is a multiple of 16 bytes.
        programs: Number of thread blocks that share the work.

    Raises:
        UnsupportedError: The slots are not dense, or their size is not a multiple of 16 bytes.
    """
    nbytes = arena[0].numel() * arena.element_size()
    if nbytes % 16 or not arena.is_contiguous():
        raise UnsupportedError(
            f"cannot gather slots of {nbytes} bytes",
            fix="use dense slots whose size is a multiple of 16 bytes",
        )
    gather_pages_kernel[(programs,)](
        addresses, pages, slots, count, arena.view(torch.int32), nbytes // 4, BLOCK=4096
    )


@triton.jit
def gather_pages_kernel(addresses, pages, slots, count, arena, words, BLOCK: tl.constexpr):
    """Copy blocks of ``BLOCK`` words, distributed round-robin over the programs."""
    per_page = tl.cdiv(words, BLOCK)
    for task in range(tl.program_id(0), tl.load(count) * per_page, tl.num_programs(0)):
        item, at = task // per_page, task % per_page * BLOCK + tl.arange(0, BLOCK)
        address = tl.load(addresses + tl.load(pages + item))
        source = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
        target = arena + tl.load(slots + item).to(tl.int64) * words
        tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)
