"""Parameters of paged experts, whose weights are in slots and in a store.

The parameters' shape and type can be read. Everything else is refused, because a read would not
return the weights, and an edit would be lost or be mixed with pages copied earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch.overrides import resolve_name

from fluxmoe.errors import UnsupportedError

_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "grad",
    "grad_fn", "is_leaf", "is_meta", "is_cpu", "is_cuda", "is_mps", "is_xpu", "is_sparse",
    "is_quantized", "is_nested", "_backward_hooks",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous", "is_inference",
    "is_floating_point", "is_complex", "__len__", "requires_grad_",
)  # fmt: skip
_READABLE = {
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    torch.Tensor.requires_grad.__set__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_SET_GRADIENT = torch.Tensor.grad.__set__


class Sealed(torch.nn.Parameter):
    """Weights of paged experts. A parameter is sealed by changing its class to this one."""

    what: ClassVar[str] = "the experts' weights cannot be used while the model is paged"
    #: Function → result in place of the tensor's own.
    place: ClassVar[Mapping[object, object]] = {}
    fix: ClassVar[str]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={[*self.shape]}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in cls.place:
            return cls.place[func]
        if func in _READABLE or (func == _SET_GRADIENT and args[1] is None):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        cls._refuse(where=name.removesuffix(".__get__"))

    @classmethod
    def _refuse(cls, *_: object, where: str = "", **__: object) -> NoReturn:
        raise UnsupportedError(cls.what, where=where, fix=cls.fix)

    # torch does not route calls of these methods through __torch_function__.
    set_ = as_subclass = unflatten = _refuse


def seal(weight: torch.nn.Parameter, kind: type[torch.nn.Parameter]) -> type[torch.nn.Parameter]:
    """Change the class of a parameter in place; return the previous class."""
    before = type(weight)
    weight.__class__ = kind
    return before


class FixedParameters(dict[str, torch.nn.Parameter | None]):
    """A module's parameters, which cannot be replaced or removed.

    Args:
        weights: The parameters.
        fix: Remedy shown in the error.
    """

    def __init__(self, weights: Mapping[str, torch.nn.Parameter | None], fix: str) -> None:
        super().__init__(weights)
        self._fix = fix

    def copy(self) -> FixedParameters:
        """Return this object, which cannot change."""
        return self

    def __setitem__(self, name: str, weight: torch.nn.Parameter | None) -> None:
        if name not in self or self[name] is not weight:
            self._refuse()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise UnsupportedError(
            "the experts' weights cannot be replaced while the model is paged", fix=self._fix
        )

    __delitem__ = pop = popitem = clear = update = setdefault = __ior__ = _refuse


class AsComputed:
    """A view of a layer for its kernel: its weights are arenas, all else is the layer's.

    Args:
        layer: The layer.
        parts: Attribute → value that replaces the layer's value.
    """

    def __init__(self, layer: torch.nn.Module, parts: Mapping[str, Any]) -> None:
        self._layer = layer
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
