"""Machine code for absent GPUs: no spills, and few enough registers for the occupancy.

Bounds are the compiler's figures (Triton 3.9) with some slack. They detect changes that double a
kernel's resources; they do not indicate its speed.
"""

from __future__ import annotations

from typing import Any

import pytest

from fluxmoe.cuda.kernels.pages import decode_to_slots_kernel
from fluxmoe.cuda.kernels.paging import gather_pages_kernel, resolve_event_kernel
from fluxmoe.cuda.kernels.tiles import Tiles, default_tiles
from tests.triton.machine_code import Needs, compile_kernel, gemm, stock_gemm

ARCHS = (80, 89, 90)

# Stock's defaults for these numbers of tokens, and tuned tiles for Qwen3-30B-A3B on an H200: tiles,
# registers per thread, KiB of shared memory per block.
TILES = {
    "1 token": (default_tiles(1, 128), 170, 66),
    "64 tokens": (default_tiles(64, 128), 230, 60),
    "96 tokens": (default_tiles(96, 128), 230, 72),
    "512 tokens": (default_tiles(512, 128), 255, 80),
    "1024 tokens": (default_tiles(1024, 128), 255, 96),
    "tuned, 1 token": (Tiles(16, 64, 64, 1, 4, 5), 120, 44),
    "tuned, 16 tokens": (Tiles(16, 64, 256, 1, 4, 2), 255, 70),
    "tuned, 96 tokens": (Tiles(16, 128, 128, 1, 4, 2), 240, 70),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", TILES)
def test_reading_in_place_spills_nothing(name: str, arch: int) -> None:
    tiles, registers, shared = TILES[name]
    needs = gemm(tiles, arch, compressed=True)
    assert needs.spills == 0 and needs.stack == 0
    assert needs.registers <= registers and needs.shared <= shared * 1024
    # The words of compressed tiles are copied 16 bytes at a time, ahead of their use.
    assert needs.counted("LDGSTS", ".128") >= 6
    products = "HGMMA" if arch == 90 and tiles.block_m >= 64 else "HMMA"
    assert needs.counted(products) > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_raw_slots_spill_nothing(arch: int) -> None:
    for tokens in (1, 96, 512):
        needs = gemm(default_tiles(tokens, 128), arch, compressed=False)
        assert needs.spills == 0 and needs.stack == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_columns_that_do_not_fill_a_step_spill_nothing(arch: int) -> None:
    needs = gemm(default_tiles(1, 128), arch, compressed=True, even=False)
    assert needs.spills == 0 and needs.stack == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_decoding_to_slots(arch: int) -> None:
    types = {name: "i32" for name in decode_to_slots_kernel.arg_names}
    types |= {name: "*i32" for name in types if name.endswith("_ptr")}
    types |= {"bytes_ptr": "*u8", "out_ptr": "*i16"}
    needs = compile_kernel(
        decode_to_slots_kernel, types, {}, arch, unaligned=frozenset({"column_tiles"})
    )
    assert needs.spills == 0 and needs.stack == 0 and needs.registers <= 128
    assert needs.counted("LDG", ".128") and needs.counted("STG", ".128")


@pytest.mark.parametrize("arch", ARCHS)
def test_gathering_reads_16_bytes_at_a_time(arch: int) -> None:
    types = {name: "*i32" for name in gather_pages_kernel.arg_names}
    types |= {"addresses": "*i64", "words": "i32"}
    needs = compile_kernel(gather_pages_kernel, types, {"BLOCK": 4096}, arch)
    assert needs.spills == 0 and needs.stack == 0 and needs.registers <= 64
    assert needs.counted("LDG", ".128") and needs.counted("STG", ".128")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("experts", [8, 128, 512])
def test_resolving_an_event(experts: int, arch: int) -> None:
    types = {name: "*i32" for name in resolve_event_kernel.arg_names}
    long = ("last_use", "use_count", "loaded_at", "page_at", "num_free", "event", "counts")
    types |= dict.fromkeys(long, "*i64")
    types |= {"flags": "*u8", "num_ids": "i32", "first": "i32", "pages": "i32"}
    needs = compile_kernel(
        resolve_event_kernel, types, {"EXPERTS": experts, "WIDTH": max(experts, 8)}, arch,
        num_warps=8, maxnreg=128,
    )  # fmt: skip
    assert needs.spills == 0 and needs.stack == 0 and needs.registers <= 128
    assert needs.shared <= 16 * 1024


@pytest.mark.xdist_group("vllm")  # vLLM takes a long time to import
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["1 token", "96 tokens", "1024 tokens", "tuned, 16 tokens"])
def test_sums_are_taken_by_the_instructions_of_stocks_kernel(
    stock: Any, name: str, arch: int
) -> None:
    """Check that instructions that add occur as often, by shape, as in stock's kernel."""
    tiles = TILES[name][0]
    want = sums(stock_gemm(stock.fused_moe_kernel, tiles, arch))
    assert want
    for compressed in (False, True):
        assert sums(gemm(tiles, arch, compressed=compressed)) == want


def sums(needs: Needs) -> dict[str, int]:
    names = ("HMMA", "HGMMA", "FADD", "FFMA")
    return {name: n for name, n in needs.instructions.items() if name.startswith(names)}


def test_sixteen_warps_fit_a_processor() -> None:
    """Stock's tables have tiles for 16 warps, which share a multiprocessor's registers."""
    tiles = Tiles(64, 128, 64, 1, 16, 3)
    needs = gemm(tiles, 90, compressed=True)
    assert needs.spills == 0 and needs.registers * 32 * tiles.num_warps <= 65536


def test_a_spill_would_be_seen() -> None:
    """Stock's tiles for an H200 are too large for an A100's registers, which the check detects."""
    assert gemm(Tiles(128, 256, 64, 16, 8, 4), 80, compressed=False).spills > 0
