"""Refusal of operations that a paged model does not support, before anything has changed.

The experts' parameters are on the meta device. Saving, moving or loading them would silently lose
them, and so would computing with them: sums on the CPU ignore addends on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch

from fluxmoe.errors import UnsupportedError

_CLOSE = "close() its handle first; a model from fluxmoe.load() is in its checkpoint"


class Uncopyable:
    """A part of a paged model; copies are rejected because nothing would fill their arenas."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedError("a paged model can be neither copied nor pickled", fix=_CLOSE)


class Refusals:
    """Rejects ``state_dict``, ``load_state_dict`` and changes of dtype, device or implementation.

    Args:
        model: The paged model.
        layers: Its expert layers.
        implementation: Name of the paging implementation.
    """

    def __init__(
        self, model: torch.nn.Module, layers: list[torch.nn.Module], implementation: str
    ) -> None:
        inside = {id(layer) for layer in layers}
        # All modules that contain experts, so that the error is raised before any work is done.
        self._guarded = [
            module
            for module in model.modules()
            if any(id(child) in inside for child in module.modules())
        ]
        self._hooks = [
            layer.register_forward_pre_hook(_Requirement(implementation)) for layer in layers
        ]
        for module in self._guarded:
            self._hooks += [
                module.register_state_dict_pre_hook(_Refusal("be saved")),
                module.register_load_state_dict_pre_hook(_Refusal("have weights loaded into it")),
            ]
            # The method behind to(), half(), cuda() ….
            module._apply = partial(_apply, module, is_experts=id(module) in inside)

    def remove(self) -> None:
        """Remove all restrictions. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        while self._guarded:
            del self._guarded.pop()._apply


def gone(module: torch.nn.Module, *_: object) -> NoReturn:
    """Forward pre-hook of experts that were released."""
    raise UnsupportedError(
        "the model's experts are gone: fluxmoe.load() put them into a store, which was released "
        "when the handle was closed",
        fix="load the model again, and close the handle after its last use",
    )


class _Refusal(Uncopyable):
    def __init__(self, what: str) -> None:
        self._what = what

    def __call__(self, *_: object) -> None:
        raise UnsupportedError(f"a paged model cannot {self._what}", fix=_CLOSE)


class _Requirement(Uncopyable):
    def __init__(self, implementation: str) -> None:
        self._implementation = implementation

    def __call__(self, module: torch.nn.Module, *_: object) -> None:
        found = module.config._experts_implementation
        if found != self._implementation:
            raise UnsupportedError(
                f"the experts of a paged model cannot be computed by {found!r}",
                fix="choose the implementation before paging; it is kept",
            )


def _apply(
    module: torch.nn.Module,
    fn: Callable[[torch.Tensor], torch.Tensor],
    *args: Any,
    is_experts: bool,
    **kwargs: Any,
) -> torch.nn.Module:
    # Pipelines call to("cpu") on a model that is already there, which is allowed.
    for dtype in {weight.dtype for weight in module.parameters()}:
        probe = torch.empty(0, dtype=dtype)
        became = fn(probe)
        if became.dtype != probe.dtype or became.device != probe.device:
            raise UnsupportedError(
                f"a paged model keeps its device and dtype: {dtype} on {probe.device} "
                f"cannot become {became.dtype} on {became.device}",
                fix=_CLOSE,
            )
    return module if is_experts else type(module)._apply(module, fn, *args, **kwargs)
