"""Startup check of whether an MoE kernel's result depends on the experts' slots or on other tokens.

Kernels are selected by processor, dtype and shape, so a machine may run one that no test has
covered. The check computes one layer with random weights twice: first with the experts in order,
then with the experts spread over an arena whose other slots are NaN. The two results are compared
bit by bit. A kernel that depends on the slots is rejected. The check then computes the tokens of a
call in several smaller calls: layers may run in waves (``core.paging.waves``) only if the results
are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from fluxmoe import checkpoint, machine
from fluxmoe.errors import InvariantError, UnsupportedError

#: Part of an expert → weights ``[experts or slots, …]``.
Parts: TypeAlias = Mapping[str, torch.Tensor]

#: The engine's computation of one MoE layer: ``(parts, table, x, weights, experts)``. ``parts`` are
#: the weights of all experts or, with a ``table`` (int64 ``[experts]`` → slot), of all slots. ``x``
#: and the result are hidden states ``[tokens, hidden]``; ``weights`` (float32) and ``experts``
#: (int64) are the routing weights and the expert ids, both ``[tokens, top_k]``.
Kernel: TypeAlias = Callable[
    [Parts, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]


@dataclass(frozen=True, slots=True)
class Checked:
    """A kernel that passed the check.

    Attributes:
        kernel: Name of the kernel.
        dtype: Name of the dtype of the weights, such as ``bfloat16``.
        milliseconds: Duration of the check.
        waves: True if a token's result does not depend on the other tokens of the call.
    """

    kernel: str
    dtype: str
    milliseconds: float
    waves: bool


#: Bytes that the weights of the checked experts may take. Two experts, or three if the order of
#: summation matters, are checked even if they take more.
_BYTES = 16 << 20
#: Tokens per call: one as in decoding, a small batch, and a number that kernels split into blocks.
_TOKENS = (1, 5, 48)
#: Tokens of a call that is repeated in parts, sizes of the parts, and maximum number of parts.
_WHOLE, _SIZES, _PARTS = 160, (1, 3, 17, 70), 4
#: Floating-point operations above which a call gets fewer tokens.
_FLOP = 2e9
#: Bytes that one call may copy if the kernel copies the weights for each token.
_COPIED = 64 << 20
#: Absolute routing weight of experts that cancel out; the partial sums must fit in float16.
_LARGE = 256.0
_SEED = 17


def require_slot_independence(
    kernel: Kernel,
    like: Parts,
    *,
    hidden: int,
    top_k: int,
    name: str,
    fix: str,
    copies: bool = False,
) -> Checked:
    """Reject a kernel whose result depends on the slots of the experts.

    Args:
        kernel: The kernel.
        like: The layer's weights ``[experts, …]``, used only for shapes and dtypes.
        hidden: Size of a hidden state.
        top_k: Number of experts per token.
        name: Name of the kernel.
        fix: Remedy shown in the error.
        copies: True if the kernel copies each token's experts, so that fewer tokens are checked.

    Raises:
        UnsupportedError: The results differ, or the kernel fails.
        InvariantError: The check finds no difference even after exchanging experts.
    """
    started = time.perf_counter()
    random = torch.Generator().manual_seed(_SEED)
    page = sum(weight[0].numel() * weight.element_size() for weight in like.values())
    dtype, count = next((weight.dtype, len(weight)) for weight in like.values())
    experts = min(count, max(2, min(top_k, 3), _BYTES // page))
    slots = experts + max(experts // 2, 1)
    table = torch.randperm(slots, generator=random)[:experts]
    arena = {part: _weights(experts, slots, weight, random) for part, weight in like.items()}
    used = min(top_k, experts)
    most = max(_FLOP / (2 * used * sum(weight[0].numel() for weight in like.values())), 2)
    if copies:
        most = min(most, max(_COPIED / (used * page), 1))
    counts = sorted({int(min(tokens, most)) for tokens in _TOKENS})
    calls = [_call(tokens, hidden, experts, used, random) for tokens in counts]
    own = {part: weight[:experts] for part, weight in arena.items()}
    where = f"processor {machine.processor()}, {dtype}"
    try:
        expected = [kernel(own, None, x.to(dtype), weights, ids) for x, weights, ids in calls]
    except Exception as error:  # the engine's own code may raise anything
        raise UnsupportedError(
            f"the MoE kernel {name} fails, even without FluxMoE: {checkpoint.first_line(error)}",
            where=where,
            fix=fix,
        ) from error
    for weight in arena.values():
        _move(weight, table)
    for (x, weights, ids), wanted in zip(calls, expected, strict=True):
        found = kernel(arena, table, x.to(dtype), weights, ids)
        if not _same(wanted, found):
            raise UnsupportedError(
                f"the results of the MoE kernel {name} depend on the slots of the experts",
                where=f"{where}, {len(x)} tokens",
                fix=f"{fix}, and please report it",
            )
    x, weights, ids = calls[0]
    if experts > 1 and _same(expected[0], kernel(arena, table.roll(1), x.to(dtype), weights, ids)):
        raise InvariantError(
            f"the self-check of the MoE kernel {name} sees no difference if experts are exchanged"
        )
    x, weights, ids = _call(int(min(_WHOLE, most)), hidden, experts, used, random)
    waves = _same_in_parts(partial(kernel, arena, table), x.to(dtype), weights, ids, random)
    took = (time.perf_counter() - started) * 1e3
    return Checked(name, str(dtype).removeprefix("torch."), took, waves)


def _same_in_parts(
    kernel: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    random: torch.Generator,
) -> bool:
    """Return True if a call has the same result when its tokens are computed in several calls."""
    whole = kernel(x, weights, ids)
    for size in _SIZES:
        parts = torch.randperm(len(x), generator=random).split(size)
        for some in parts[:_PARTS]:
            if not _same(kernel(x[some], weights[some], ids[some]), whole[some]):
                return False
    return True


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))


def _call(
    tokens: int, hidden: int, experts: int, top_k: int, random: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Make hidden states, routing weights and expert ids for one call.

    If a token has at least three experts, two of them are equal (see ``_weights``) and cancel each
    other out, up to rounding. Without such experts, the order in which a kernel sums would change
    few results in a narrow dtype.
    """
    scores = torch.rand(tokens, experts, generator=random)
    x = torch.randn(tokens, hidden, generator=random)
    if top_k < 3:
        return x, *torch.topk(scores.softmax(-1), top_k)
    pair = 2 * torch.randint(experts // 2, (tokens, 1), generator=random)
    pair = torch.cat([pair, pair + 1], -1)
    weights, ids = torch.topk(scores.scatter(-1, pair, -torch.inf).softmax(-1), top_k - 2)
    cancelled = torch.tensor([_LARGE, -_LARGE]).expand(tokens, 2)
    order = torch.rand(tokens, top_k, generator=random).argsort(-1)
    both = torch.cat([cancelled, weights], -1), torch.cat([pair, ids], -1)
    return x, *(given.gather(-1, order) for given in both)


def _weights(experts: int, slots: int, like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Make an arena with random experts in its first slots, in equal pairs if more than two.

    The weights of large experts repeat a random block.
    """
    arena = torch.empty(slots, *like.shape[1:], dtype=like.dtype)
    rows = arena.view(slots, -1)
    block = torch.randn(min(rows.shape[1], 1 << 16), generator=random)
    block = (block * like.shape[-1] ** -0.5).to(like.dtype)
    times = -(-rows.shape[1] // len(block))
    alike = 2 if experts > 2 else 1
    for expert in range(experts):
        rows[expert] = block.roll(7 * (expert // alike)).repeat(times)[: rows.shape[1]]
    return arena


def _move(arena: torch.Tensor, table: torch.Tensor) -> None:
    """Move the experts from the first slots to those in ``table``; other slots become NaN."""
    experts = arena[: len(table)].clone()
    arena.fill_(torch.nan)
    arena[table] = experts
