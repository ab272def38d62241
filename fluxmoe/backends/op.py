"""``fluxmoe::acquire``: the one operator through which compiled and eager models call the pager.

The operator is opaque to ``torch.compile``: it takes the routed expert ids and returns slots, so
the kernel that follows depends on it and cannot be moved before it. It is declared functional.
Declaring an input mutated instead changes what the compiler fuses around the router, and with it
the output of some models (docs/adr/0001).
"""

from __future__ import annotations

import torch

from fluxmoe.core.pager import ExpertPager

# A traced operator can only carry numbers, so pagers are known to it by number.
_pagers: dict[int, ExpertPager] = {}


def attach(pager: ExpertPager) -> int:
    """Make a pager reachable from the operator; returns its handle, the lowest free number."""
    handle = next(i for i in range(len(_pagers) + 1) if i not in _pagers)
    _pagers[handle] = pager
    return handle


def detach(handle: int) -> None:
    """Forget a pager. Idempotent."""
    _pagers.pop(handle, None)


def _acquire(topk_ids: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    slots = torch.empty_like(topk_ids, dtype=torch.int32)
    # numpy's reshape is cheaper than torch's; the ids are contiguous, so neither copies.
    _pagers[handle].acquire(layer, topk_ids.numpy().reshape(-1), slots.numpy().reshape(-1))
    return slots


def _fake(topk_ids: torch.Tensor, handle: int, layer: int) -> torch.Tensor:
    return torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)


_library = torch.library.Library("fluxmoe", "FRAGMENT")
_library.define("acquire(Tensor topk_ids, int handle, int layer) -> Tensor")
_library.impl("acquire", _acquire, "CPU")
torch.library.register_fake("fluxmoe::acquire", _fake, lib=_library)

acquire = torch.ops.fluxmoe.acquire
