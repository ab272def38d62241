"""The kernel of both projections: a grouped GEMM over sorted token blocks.

The order of blocks and of summation, the rounding, and the multiplication by the router's weight
match stock vLLM's ``fused_moe_kernel``, so that equal tiles give equal bits. Only the source of the
weights differs: raw slots or compressed pages, looked up in the expert table.
"""

from __future__ import annotations

from fluxmoe.cuda.kernels.decode import decode, load_flags, load_headers, next_step, step_words
from fluxmoe.cuda.kernels.language import tl, triton


@triton.jit
def grouped_gemm_kernel(
    x_ptr, w_ptr, flag_ptr, offsets_ptr, out_ptr, scale_ptr, table_ptr,
    rows_ptr, experts_ptr, padded_ptr,
    N, K, size, valid, stride_x, stride_w, stride_out, headers_at, flags_at, pool_at,
    COMPRESSED: tl.constexpr, TOP_K: tl.constexpr, SCALE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute ``out[row] = x[row // TOP_K] @ w[table[expert of row]].T``, scaled if SCALE.

    ``table_ptr`` has, per expert, s ≥ 0 for raw slot s, −1 if the expert is absent, and −2 − p for
    compressed page p. Each variant computes the experts of its own kind and skips the others. Rows
    of absent experts become NaN, so that bookkeeping errors are visible. With SCALE, each row is
    multiplied by ``scale[row]``. With COMPRESSED, ``w_ptr`` points to words, ``flag_ptr`` to the
    same memory as bytes, and ``offsets_ptr`` to page starts in units of 128 bytes.
    """
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(size, BLOCK_M), tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * blocks_n
    first_m = pid // in_group * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    pid_m = first_m + pid % in_group % group
    pid_n = pid % in_group // group
    if pid_m * BLOCK_M >= tl.load(padded_ptr):
        return

    row = tl.load(rows_ptr + pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    real = row < valid
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out = out_ptr + row[:, None] * stride_out + column[None, :]
    out_mask = real[:, None] & (column < N)[None, :]
    slot = tl.load(table_ptr + tl.load(experts_ptr + pid_m)).to(tl.int64)
    if slot == -1:
        nothing = tl.full((BLOCK_M, BLOCK_N), float("nan"), tl.bfloat16)
        tl.store(out, nothing, mask=out_mask)
        return
    if (slot < -1) != COMPRESSED:
        return

    wrapped = column % N
    k = tl.arange(0, BLOCK_K)
    x = x_ptr + (row // TOP_K)[:, None] * stride_x + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    if COMPRESSED:
        start = tl.load(offsets_ptr + (-2 - slot)).to(tl.int64)  # in units of 32 words
        page = w_ptr + start * 32
        flags = flag_ptr + start * 128 + flags_at
        segments = tl.cdiv(K, 128)
        tile = pid_n * BLOCK_N // 64
        words = tl.arange(0, BLOCK_K // 8)
        row_tile = wrapped // 64 * (K // 64) * 1536 + wrapped % 64 * 8
        offset = row_tile[:, None] + (words // 8 * 1536 + words % 8)[None, :]
        ptr = page
        header_ptr = page + headers_at // 4 + wrapped
        # The flags are loaded one step ahead, so that the branch on them does not wait for memory.
        special = load_flags(flags, segments, 0, tile, N // 64, BLOCK_N, BLOCK_K)
        for step in range(0, steps):
            after = load_flags(flags, segments, step + 1, tile, N // 64, BLOCK_N, BLOCK_K)
            left = K - step * BLOCK_K
            header = load_headers(header_ptr, N, step, BLOCK_N, BLOCK_K, segments - 1)
            if EVEN_K:
                a = tl.load(x, mask=real[:, None], other=0.0)
                mask = None
            else:
                a = tl.load(x, mask=real[:, None] & (k < left)[None, :], other=0.0)
                mask = (wrapped >= 0)[:, None] & (step_words(step, BLOCK_K) < K // 8)[None, :]
            w = decode(
                ptr, offset, 512, mask, header, page + pool_at // 4, special, step,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            total += tl.dot(a, tl.trans(w))
            x += BLOCK_K
            ptr += next_step(step, BLOCK_K)
            special = after
    else:
        w_tile = w_ptr + slot * stride_w + k[:, None] + wrapped.to(tl.int64)[None, :] * K
        for step in range(0, steps):
            left = K - step * BLOCK_K
            if EVEN_K:
                a = tl.load(x, mask=real[:, None], other=0.0)
                w = tl.load(w_tile)
            else:
                a = tl.load(x, mask=real[:, None] & (k < left)[None, :], other=0.0)
                w = tl.load(w_tile, mask=(k < left)[:, None], other=0.0)
            total += tl.dot(a, w)
            x += BLOCK_K
            w_tile += BLOCK_K

    if SCALE:
        total *= tl.load(scale_ptr + row, mask=real, other=0)[:, None]
    tl.store(out, total.to(tl.bfloat16), mask=out_mask)
