"""Refusal of operations that a paged model does not support, before they change anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch.fx import _symbolic_trace as fx

from fluxmoe.backends.torch.weights.sealed import CLOSE
from fluxmoe.errors import UnsupportedError


class Uncopyable:
    """A handle that refuses to be copied, because no pager would fill the copy's arenas."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        _refuse_copy()


class Refusals:
    """Hooks in a paged model that refuse copies, loading, scripting, and a new dtype or device.

    Args:
        model: The paged model.
        layers: Its expert layers.
    """

    def __init__(self, model: torch.nn.Module, layers: list[torch.nn.Module]) -> None:
        inside = {id(layer) for layer in layers}
        # All modules that contain experts, so that the error is raised before any work is done.
        self._guarded = [
            module
            for module in model.modules()
            if any(id(child) in inside for child in module.modules())
        ]
        self._hooks = []
        for module in self._guarded:
            self._hooks.append(module.register_load_state_dict_pre_hook(_refuse_load))
            vars(module).update(
                # The method behind to(), half(), cuda() and others.
                _apply=partial(_apply, module, is_experts=id(module) in inside),
                __getstate__=_refuse_copy,
                __prepare_scriptable__=_refuse_script,
            )

    def remove(self) -> None:
        """Remove all hooks. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        while self._guarded:
            attributes = vars(self._guarded.pop())
            for name in ("_apply", "__getstate__", "__prepare_scriptable__"):
                attributes.pop(name, None)  # other code may have removed the attribute


@torch.compiler.assume_constant_result  # called instead of traced, so that errors keep their class
def require_no_export() -> None:
    """Raise UnsupportedError during torch.export, whose graph would outlive the pages."""
    if torch.compiler.is_exporting():
        raise _untraceable("torch.export")


def require_plain(*inputs: torch.Tensor) -> None:
    """Raise UnsupportedError in tracers and transforms, and for all but plain CPU tensors.

    A tracer would record the slots of the resident pages as constants.
    """
    if torch._C._get_tracing_state() is not None:
        raise _untraceable("torch.jit.trace")
    if fx._is_fx_tracing_flag:
        raise _untraceable("torch.fx")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise _untraceable("a transform of torch.func")
    for tensor in inputs:
        kind = type(tensor)
        if kind is torch.Tensor and tensor.is_cpu:
            continue
        if getattr(kind, "__torch_dispatch__", None) is not _VALUES or not tensor.is_cpu:
            raise UnsupportedError(
                f"a paged model cannot compute with a {kind.__module__}.{kind.__qualname__} on "
                f"{tensor.device}",
                fix="call it with plain tensors on the CPU",
            )


#: The dispatch method of plain tensors; fake, functional and distributed tensors have another.
_VALUES = torch.Tensor.__torch_dispatch__


def _untraceable(by: str) -> UnsupportedError:
    return UnsupportedError(
        f"a paged model cannot be traced, exported or transformed by {by}: the slots of its pages "
        "would become constants",
        fix=f"{CLOSE}; torch.compile is supported",
    )


def _refuse_copy() -> NoReturn:
    raise UnsupportedError("a paged model can be neither copied nor pickled", fix=CLOSE)


def _refuse_script() -> NoReturn:
    raise _untraceable("torch.jit.script")


def _refuse_load(*_: object) -> NoReturn:
    raise UnsupportedError(
        "a paged model cannot have weights loaded into it",
        fix="call update_weights() of its handle, with the names used before paging",
    )


def _apply(
    module: torch.nn.Module,
    fn: Callable[[torch.Tensor], torch.Tensor],
    *args: Any,
    is_experts: bool,
    **kwargs: Any,
) -> torch.nn.Module:
    # Pipelines call to("cpu") on a model that is already on the CPU, which is allowed.
    for dtype in {weight.dtype for weight in module.parameters()}:
        probe = torch.tensor([*os.urandom(16)]).to(dtype)
        try:
            became = fn(probe)
        except Exception as error:
            raise UnsupportedError(
                f"a paged model keeps its device and dtype: {error}", fix=CLOSE
            ) from error
        if became.dtype != probe.dtype or became.device != probe.device:
            raise UnsupportedError(
                f"a paged model keeps its device and dtype: {dtype} on {probe.device} "
                f"cannot become {became.dtype} on {became.device}",
                fix=CLOSE,
            )
        if not torch.equal(became, probe):
            raise UnsupportedError("a paged model keeps its weights", fix=CLOSE)
    return module if is_experts else type(module)._apply(module, fn, *args, **kwargs)
