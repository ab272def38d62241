"""Kernels compiled for an absent GPU, and the resources that the machine code needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fluxmoe.cuda.kernels.experts import most_registers
from fluxmoe.cuda.kernels.gemm import grouped_gemm_kernel
from fluxmoe.cuda.kernels.tiles import Tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Needs:
    """Registers, stack bytes, and spilled loads and stores per thread; shared memory per block."""

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: dict[str, int]

    def counted(self, name: str, ending: str = "") -> int:
        """Count the instructions whose names begin with ``name`` and end with ``ending``."""
        return sum(
            count
            for each, count in self.instructions.items()
            if each.startswith(name) and each.endswith(ending)
        )


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    *,
    unaligned: frozenset[str] = frozenset(),
    **options: int | None,
) -> Needs:
    """Compile a kernel for ``sm_<arch>`` with arguments of ``types``; those not ``unaligned`` are
    multiples of 16, as detected by the launcher."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name not in constants and name not in unaligned and types[name] != "fp32"
    }
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return inspect(built)


def inspect(built: Any) -> Needs:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code, re.M)
    count: dict[str, int] = {}
    for name in names:
        count[name] = count.get(name, 0) + 1
    spills = sum(n for name, n in count.items() if name.split(".")[0] in ("LDL", "STL"))
    stack = int(found[2]) + int(found[3])
    return Needs(int(found[1]), stack, spills, built.metadata.shared, count)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def gemm(tiles: Tiles, arch: int, *, compressed: bool, even: bool = True) -> Needs:
    """Compile the projection kernel as launched for top-8 and sizes that are multiples of 16."""
    types = {name: "i32" for name in grouped_gemm_kernel.arg_names}
    types |= {name: "*i32" for name in ("offsets_ptr", "table_ptr", "rows_ptr", "experts_ptr")}
    types |= {"padded_ptr": "*i32", "scale_ptr": "*fp32", "x_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= {"w_ptr": "*i32", "flag_ptr": "*u8"} if compressed else {
        "w_ptr": "*bf16", "flag_ptr": "*bf16"
    }  # fmt: skip
    constants = dict(
        COMPRESSED=compressed, TOP_K=8, SCALE=True, EVEN_K=even, BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
    )  # fmt: skip
    return compile_kernel(
        grouped_gemm_kernel, types, constants, arch, unaligned=frozenset({"valid"}),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        maxnreg=most_registers(tiles) if compressed else None,
    )  # fmt: skip


def stock_gemm(kernel: Any, tiles: Tiles, arch: int) -> Needs:
    """Compile vLLM's ``fused_moe_kernel`` for the same launch."""
    types = {name: "i32" for name in kernel.arg_names}
    types |= {name: "*bf16" for name in ("a_ptr", "b_ptr", "c_ptr")}
    types |= {name: "*i32" for name in ("sorted_token_ids_ptr", "expert_ids_ptr")}
    types |= {"num_tokens_post_padded_ptr": "*i32", "topk_weights_ptr": "*fp32"}
    constants = dict.fromkeys(("b_bias_ptr", "a_scale_ptr", "b_scale_ptr"))
    constants |= dict.fromkeys(("stride_ak", "stride_bk", "stride_cn", "SPLIT_K"), 1)
    constants |= {name: 0 for name in types if name[:9] in ("stride_as", "stride_bs", "stride_bb")}
    switches = ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "per_channel_quant", "HAS_BIAS",
                "SWAP_AB", "USE_TD", "naive_block_assignment", "group_n", "group_k")  # fmt: skip
    constants |= dict.fromkeys(switches, False)
    constants |= dict(
        MUL_ROUTED_WEIGHT=True, top_k=8, compute_type=tl.bfloat16, BLOCK_SIZE_M=tiles.block_m,
        BLOCK_SIZE_N=tiles.block_n, BLOCK_SIZE_K=tiles.block_k, GROUP_SIZE_M=tiles.group_m,
    )  # fmt: skip
    return compile_kernel(
        kernel, types, constants, arch, unaligned=frozenset({"num_valid_tokens"}),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
