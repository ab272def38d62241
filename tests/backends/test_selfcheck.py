"""The self-check accepts kernels that read experts by slot and rejects all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fluxmoe.backends import selfcheck
from fluxmoe.errors import FluxMoEError, InvariantError, UnsupportedError

LIKE = {"up": torch.zeros(8, 24, 16), "down": torch.zeros(8, 16, 24)}


def by_slot(
    parts: selfcheck.Parts,
    table: torch.Tensor | None,
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    """Sum in the router's order, as a correct kernel does."""
    slots = experts if table is None else table[experts]
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, slot in zip(weights[token], slots[token], strict=True):
            up, down = parts["up"][slot], parts["down"][slot]
            out[token] += (weight * (down @ torch.relu(up @ x[token]))).to(x.dtype)
    return out


def in_slot_order(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    """Sum in slot order, as a kernel that groups tokens by slot might."""
    slots = experts if table is None else table[experts]
    order = slots.argsort(-1)
    sorted_ = (weights.gather(-1, order), experts.gather(-1, order))
    return by_slot(parts, table, x, *sorted_)


def in_slot_order_rounded_once(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    """Like ``in_slot_order``, but sum in float32, so that few bits differ between two orders."""
    wide = {part: weight.float() for part, weight in parts.items()}
    return in_slot_order(wide, table, x.float(), weights, experts).to(x.dtype)


def without_table(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    return by_slot(parts, None, x, weights, experts)


def reads_beside(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    """Read unused slots and multiply them by zero, as a padded kernel might."""
    out = by_slot(parts, table, x, weights, experts)
    return out + 0 * parts["up"].sum()


def only_in_batches(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    out = by_slot(parts, table, x, weights, experts)
    return out if table is None or len(x) < 48 else 2 * out


def knows_the_others(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    """Sum in reverse order in large calls, like a kernel that uses other block sizes."""
    if len(x) < 20:
        return by_slot(parts, table, x, weights, experts)
    order = torch.arange(experts.shape[1]).flip(0)
    return by_slot(parts, table, x, weights[:, order], experts[:, order])


def check(
    kernel: selfcheck.Kernel, like: selfcheck.Parts = LIKE, top_k: int = 3
) -> selfcheck.Checked:
    return selfcheck.require_slot_independence(
        kernel, like, hidden=16, top_k=top_k, name="k (vec)", fix="use another"
    )


def test_a_sound_kernel_passes() -> None:
    check(by_slot)
    check(by_slot, top_k=20)
    check(by_slot, top_k=2)
    check(by_slot, {part: weight[:2] for part, weight in LIKE.items()})
    check(by_slot, {part: weight[:3] for part, weight in LIKE.items()})
    check(by_slot, {part: weight[:1] for part, weight in LIKE.items()}, top_k=1)
    check(by_slot, {part: weight.bfloat16() for part, weight in LIKE.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_depends_on_other_tokens_cannot_run_in_waves(dtype: torch.dtype) -> None:
    like = {part: weight.to(dtype) for part, weight in LIKE.items()}
    assert check(by_slot, like).waves
    assert not check(knows_the_others, like).waves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kernel",
    [in_slot_order, in_slot_order_rounded_once, without_table, reads_beside, only_in_batches],
)
def test_a_faulty_kernel_is_refused(
    kernel: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check(kernel, {part: weight.to(dtype) for part, weight in LIKE.items()})
    assert caught.value.what.startswith("the results of the MoE kernel k (vec) depend on the slots")
    assert "processor " in caught.value.where and str(dtype) in caught.value.where


@pytest.mark.parametrize(
    ("name", "fault", "error"),
    [
        ("_same", lambda one, other: True, InvariantError),
        ("_same", lambda one, other: False, UnsupportedError),
        ("_move", lambda arena, table: None, UnsupportedError),
        ("_weights", lambda experts, slots, like, random: torch.ones(slots, *like.shape[1:]),
         InvariantError),
    ],
)  # fmt: skip
def test_a_faulty_comparison_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, fault: Any, error: type[FluxMoEError]
) -> None:
    """The kernel is sound, so only the fault in the comparison can raise the error."""
    monkeypatch.setattr(selfcheck, name, fault)
    with pytest.raises(error):
        check(by_slot)


def test_a_kernel_that_computes_nothing_is_noticed() -> None:
    with pytest.raises(InvariantError, match="sees no difference"):
        check(lambda parts, table, x, weights, experts: torch.full_like(x, torch.nan))


def test_large_experts_take_less(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def kernel(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
        seen.append((len(parts["up"]), len(x), experts.shape[1]))
        return by_slot(parts, table, x, weights, experts)

    check(kernel)
    assert seen[:7] == [(8, 1, 3), (8, 5, 3), (8, 48, 3), (12, 1, 3), (12, 5, 3), (12, 48, 3),
                        (12, 1, 3)]  # fmt: skip
    parts = [160, 1, 1, 1, 1, 3, 3, 3, 3, 17, 17, 17, 17, 70, 70, 20]
    assert [tokens for _, tokens, _ in seen[7:]] == parts
    seen.clear()
    monkeypatch.setattr(selfcheck, "_BYTES", 1)
    monkeypatch.setattr(selfcheck, "_FLOP", 1.0)
    check(kernel)
    assert seen[:5] == [(3, 1, 3), (3, 2, 3), (4, 1, 3), (4, 2, 3), (4, 1, 3)]
    assert seen[5:] == [(4, tokens, 3) for tokens in (2, 1, 1, 2, 2, 2)]
