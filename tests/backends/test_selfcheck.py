"""The self-check accepts kernels that read experts by slot and rejects all others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fluxmoe.backends import selfcheck
from fluxmoe.errors import UnsupportedError

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


def without_table(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    return by_slot(parts, None, x, weights, experts)


def reads_beside(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    """Multiply an unused slot by zero, as a padded kernel might."""
    out = by_slot(parts, table, x, weights, experts)
    return out + 0 * parts["up"].sum()


def only_in_batches(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
    out = by_slot(parts, table, x, weights, experts)
    return out if table is None or len(x) < 48 else out.nextafter(torch.tensor(9.0))


def check(kernel: selfcheck.Kernel, like: selfcheck.Parts = LIKE, top_k: int = 3) -> None:
    selfcheck.require_slot_independence(kernel, like, hidden=16, top_k=top_k, name="k (vec)")


def test_a_sound_kernel_passes() -> None:
    check(by_slot)
    check(by_slot, top_k=20)
    check(by_slot, {part: weight[:1] for part, weight in LIKE.items()}, top_k=1)
    check(by_slot, {part: weight.bfloat16() for part, weight in LIKE.items()})


@pytest.mark.parametrize("kernel", [in_slot_order, without_table, reads_beside, only_in_batches])
def test_a_faulty_kernel_is_refused(kernel: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check(kernel)
    assert caught.value.what.startswith("the results of the MoE kernel k (vec) depend on the slots")
    assert "processor " in caught.value.where and "torch.float32" in caught.value.where


def test_large_experts_take_less(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def kernel(parts, table, x, weights, experts):  # type: ignore[no-untyped-def]
        seen.append((len(parts["up"]), len(x), experts.shape[1]))
        return by_slot(parts, table, x, weights, experts)

    check(kernel)
    assert seen == [(8, 1, 3), (8, 5, 3), (8, 48, 3), (12, 1, 3), (12, 5, 3), (12, 48, 3)]
    seen.clear()
    monkeypatch.setattr(selfcheck, "_BYTES", 1)
    monkeypatch.setattr(selfcheck, "_FLOP", 1.0)
    check(kernel)
    assert seen == [(2, 1, 2), (2, 2, 2), (3, 1, 2), (3, 2, 2)]
