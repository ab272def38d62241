"""No bank exceeds the limit of the CPU kernel's slot index, which is measured on the real kernel.

The kernel runs on an arena with 12 GiB of addresses and 36 MiB of memory. It runs in a separate
process, because beyond the limit it reads unrelated memory or crashes.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmoe.backends.vllm.child.child import ENVIRONMENT
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.sizing import fewest_banks
from fluxmoe.core.types import Geometry, PageClass, Part
from fluxmoe.errors import UnsupportedError

#: Limit for experts of Qwen3-30B-A3B, with hidden size 2048 and intermediate size 768.
LIMIT = 683

KERNEL = """
import numpy as np
import torch
import vllm._custom_ops as ops
from fluxmoe.backends.tensors import as_weight
from fluxmoe.backends.vllm.worker.reach import bank_limit, require_addressable
from fluxmoe.core.memory.arena import Arena
from fluxmoe.core.memory.host import CpuSubstrate
from fluxmoe.errors import InvariantError

H, I, FRAME, LIMIT = 2048, 768, 1 << 20, 683
WRITTEN = [0, LIMIT - 1, LIMIT, 2 * LIMIT - 1]
shapes = [(2 * I, H), (H, I)]
sizes = [2 * rows * columns for rows, columns in shapes]  # bytes in bf16: whole frames

# The same weights in four slots of the arena; nothing is committed at the others.
substrate = CpuSubstrate(len(WRITTEN) * sum(sizes) // FRAME, FRAME)
generator, frame, parts = torch.Generator().manual_seed(0), 0, []
for (rows, columns), size in zip(shapes, sizes):
    weight = torch.randn(rows * columns, generator=generator).mul(0.05).to(torch.bfloat16)
    arena = Arena(substrate, 2 * LIMIT * size)
    for slot in WRITTEN:
        arena.commit(slot * size // FRAME, np.arange(frame, frame + size // FRAME))
        frame += size // FRAME
        arena.rows(2 * LIMIT, size)[slot] = weight.view(torch.uint8).numpy()
    parts.append(arena.rows(2 * LIMIT, size))

x = torch.randn(33, H, generator=generator).to(torch.bfloat16)

def run(weights, slot):
    out = torch.full_like(x, float("nan"))
    ids = torch.full((len(x), 1), slot, dtype=torch.int32)
    ones = torch.ones(len(x), 1)
    ops.cpu_fused_moe(out, x, *weights, None, None, ones, ids, "silu", "vec")
    return out.view(torch.int16)

def like(shape):
    return torch.empty(1, *shape, dtype=torch.bfloat16, device="meta")

def bank(first, slots):
    return [
        require_addressable(as_weight(rows[first : first + slots], like(shape)))
        for rows, shape in zip(parts, shapes)
    ]

assert bank_limit(2 * I * H) == LIMIT
expected = run(bank(0, LIMIT), 0)
assert expected.view(torch.bfloat16).isfinite().all() and expected.any()
print("last slot:", torch.equal(run(bank(0, LIMIT), LIMIT - 1), expected))
print("last slot of a later bank:", torch.equal(run(bank(LIMIT, LIMIT), LIMIT - 1), expected))
try:
    bank(0, LIMIT + 1)
except InvariantError as error:
    print("one slot more:", error, flush=True)

# The rejected call, made anyway.
beyond = [
    torch.from_numpy(rows).view(torch.bfloat16).view(2 * LIMIT, *shape)
    for rows, shape in zip(parts, shapes)
]
print("last slot of too large a bank:", torch.equal(run(beyond, LIMIT - 1), expected), flush=True)
print("slot beyond:", torch.equal(run(beyond, LIMIT), expected))
"""

ASSERTION = """
import torch
from fluxmoe.backends.vllm.worker.reach import bank_limit, require_addressable
from fluxmoe.errors import InvariantError

for elements, limit in [(2 * 768 * 2048, 683), (2 * 1024 * 1024, 1024), (2 * 96 * 256, 43691)]:
    assert bank_limit(elements) == limit
    page = torch.zeros(elements, dtype=torch.bfloat16)
    at_the_limit = page.expand(limit, elements)  # only the sizes matter here
    assert require_addressable(at_the_limit) is at_the_limit
    try:
        require_addressable(page.expand(limit + 1, elements))
    except InvariantError as error:
        assert f"a bank of {limit + 1} slots" in str(error) and f"can address {limit}" in str(error)
    else:
        raise SystemExit("accepted")
print("done")
"""


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.vllm
def test_the_kernel_addresses_a_bank_to_its_end_and_no_further() -> None:
    result = python(KERNEL)
    lines = result.stdout.splitlines()
    assert lines[:4] == [
        "last slot: True",
        "last slot of a later bank: True",
        f"one slot more: FM303: a bank of {LIMIT + 1} slots of {2 * 768 * 2048} weights: "
        f"cpu_fused_moe can address {LIMIT}",
        "last slot of too large a bank: True",
    ], result.stderr
    crashed = result.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    assert crashed if len(lines) == 4 else lines[4] == "slot beyond: False", result.stderr


@pytest.mark.vllm
def test_an_arena_beyond_the_limit_is_refused() -> None:
    result = python(ASSERTION)
    assert result.stdout == "done\n", result.stderr


# --- banks ---------------------------------------------------------------------------------------

FRAME = 4096


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, PageClass, int, int | None, int]:
    geometry = Geometry(draw(st.integers(1, 9)), draw(st.integers(1, 12)))
    parts = draw(st.lists(st.integers(1, 3 * FRAME), min_size=1, max_size=3))
    page_class = PageClass(tuple(Part(f"p{i}", size, size) for i, size in enumerate(parts)))
    least = frames_for(page_class, geometry.experts_per_layer, FRAME)
    most = frames_for(page_class, geometry.num_pages, FRAME)
    frames = draw(st.integers(least, most + 10))
    limit = draw(st.none() | st.integers(geometry.experts_per_layer, geometry.num_pages + 2))
    return geometry, page_class, frames, limit, draw(st.integers(1, 10))


@given(cases())
def test_banks(case: tuple[Geometry, PageClass, int, int | None, int]) -> None:
    geometry, page_class, frames, limit, wanted = case
    experts = geometry.experts_per_layer
    slots, bank_of = fewest_banks(geometry, page_class, frames, FRAME, limit, wanted, least=frames)

    assert len(bank_of) == geometry.num_layers
    assert bank_of[0] == 0
    assert bank_of[-1] == len(slots) - 1
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(bank_of))
    for bank, count in enumerate(slots):
        assert experts <= count <= bank_of.count(bank) * experts
        assert limit is None or count <= limit
    assert sum(frames_for(page_class, count, FRAME) for count in slots) <= frames


@given(cases())
def test_one_bank_where_one_is_enough(
    case: tuple[Geometry, PageClass, int, int | None, int],
) -> None:
    geometry, page_class, frames, _, _ = case
    slots, _ = fewest_banks(geometry, page_class, frames, FRAME, None, 1, least=frames)
    assert len(slots) == 1
    assert slots[0] == geometry.num_pages or frames_for(page_class, slots[0] + 1, FRAME) > frames


@given(cases())
def test_where_all_pages_fit_all_have_a_slot(
    case: tuple[Geometry, PageClass, int, int | None, int],
) -> None:
    geometry, page_class, _, limit, wanted = case
    layers, experts = geometry.num_layers, geometry.experts_per_layer
    room = layers * len(page_class.parts) + frames_for(page_class, geometry.num_pages, FRAME)
    slots, _ = fewest_banks(geometry, page_class, room, FRAME, limit, wanted, least=room)
    assert sum(slots) == geometry.num_pages
    slots, _ = fewest_banks(geometry, page_class, room, FRAME, limit, layers, least=room)
    assert slots == [experts] * layers


@given(cases())
def test_each_bank_can_shrink_to_one_layer(
    case: tuple[Geometry, PageClass, int, int | None, int],
) -> None:
    geometry, page_class, frames, _, wanted = case
    layer = frames_for(page_class, geometry.experts_per_layer, FRAME)
    slots, _ = fewest_banks(geometry, page_class, frames, FRAME, None, wanted, least=layer)
    assert len(slots) * layer <= layer


def test_a_layer_that_the_kernel_cannot_address() -> None:
    page_class = PageClass((Part("w13", FRAME, FRAME),))
    with pytest.raises(UnsupportedError, match=r"can address 255 slots.* has 256 experts"):
        fewest_banks(Geometry(2, 256), page_class, 10_000, FRAME, 255, 1, least=10_000)
