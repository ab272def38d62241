"""The experts' own weights, sealed while FluxMoE computes with copies of them.

An edit of these weights would be lost or, where the store shares the weights' memory, be mixed with
pages copied earlier. The experts' weights of a loaded model have no memory, and sums on the CPU
ignore addends without memory. The weights are therefore sealed: their shape and type can be read,
and everything else is refused. Views made before paging cannot be sealed, but share the version
counter of their weight, which is watched. Arrays, and tensors such as ``weight.data``, share only
the memory, of which a checksum is taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch.overrides import resolve_name

from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.paging.event import Slots
from fluxmoe.core.paging.pager import EventWatcher, ExpertPager
from fluxmoe.core.types import Ints
from fluxmoe.errors import UnsupportedError

#: The remedy for most operations that a paged model refuses.
CLOSE = "close() its handle first; after fluxmoe.load(), use the weights in the checkpoint"

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
#: The place of the weights, including those of a loaded model, which are in a store.
_IN_MEMORY = {
    torch.Tensor.device.__get__: torch.device("cpu"),
    torch.Tensor.is_cpu.__get__: True,
    torch.Tensor.is_meta.__get__: False,
}
_SET_GRADIENT = torch.Tensor.grad.__set__


class Sealed(torch.nn.Parameter):
    """Weights of paged experts. A parameter is sealed by changing its class to this one."""

    what: ClassVar[str] = "the experts' weights cannot be used while the model is paged"
    place: ClassVar[Mapping[object, object]] = _IN_MEMORY
    fix: ClassVar[str] = f"{CLOSE}; choose the experts implementation before paging"

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

    # torch does not pass calls to these methods to __torch_function__.
    set_ = as_subclass = unflatten = _refuse


class Gone(Sealed):
    """Weights of a loaded model whose handle was closed."""

    what = (
        "the model's experts are gone: fluxmoe.load() put them into a store, which was released "
        "when the handle was closed"
    )
    place: ClassVar[Mapping[object, object]] = {}
    fix = "load the model again, and close the handle after its last use"


def seal(weight: torch.nn.Parameter, kind: type[torch.nn.Parameter]) -> type[torch.nn.Parameter]:
    """Change the class of a parameter in place; return the previous class."""
    before = type(weight)
    weight.__class__ = kind
    return before


class FixedParameters(dict[str, torch.nn.Parameter | None]):
    """A module's parameters, which cannot be replaced or removed."""

    def __setitem__(self, name: str, weight: torch.nn.Parameter | None) -> None:
        if name not in self or self[name] is not weight:
            self._refuse()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise UnsupportedError(
            "the experts' weights cannot be replaced while the model is paged", fix=CLOSE
        )

    __delitem__ = pop = popitem = clear = update = setdefault = __ior__ = _refuse


class Shared:
    """A weight that shares memory with tensors or arrays from before paging, and its checksum."""

    def __init__(self, layer: int, weight: torch.nn.Parameter) -> None:
        self._layer, self._weight = layer, weight.detach()
        self._checksum = self._sum()

    @staticmethod
    def among(layers: Iterable[Iterable[torch.nn.Parameter]]) -> list[Shared]:
        """Find such weights among each layer's experts, before FluxMoE refers to any of them."""
        return [
            Shared(index, weight)
            for index, layer in enumerate(layers)
            for weight in layer
            # One reference is the weight's, and one is this expression's.
            if torch._C._storage_Use_Count(weight.untyped_storage()._cdata) > 2
        ]

    def updated(self, layers: Container[int]) -> None:
        """Accept the weight's new values if the weight belongs to one of ``layers``."""
        if self._layer in layers:
            self._checksum = self._sum()

    def check(self) -> None:
        """Raise UnsupportedError if the weight has changed."""
        if self._sum() != self._checksum:
            raise _changed(self._layer)

    def _sum(self) -> int:
        return zlib.crc32(as_rows(self._weight).data)


class Watched:
    """A pager that refuses events for layers whose weights were edited through a view.

    Args:
        pager: The pager.
        lock: Lock of the model, which compiled passes claim.
        layers: The experts' weights of each layer, not sealed yet. Edits of inference tensors
            cannot be detected.
    """

    def __init__(
        self,
        pager: ExpertPager,
        lock: ForwardLock,
        layers: Iterable[Iterable[torch.nn.Parameter]],
    ) -> None:
        self._pager, self._lock = pager, lock
        self._weights = [
            [
                (weight, alias, alias._version)
                for weight in layer
                if not weight.is_inference()
                for alias in [weight.detach()]  # not sealed, but shares the version
            ]
            for layer in layers
        ]

    @property
    def watcher(self) -> EventWatcher | None:
        return self._pager.watcher

    @watcher.setter
    def watcher(self, watcher: EventWatcher | None) -> None:
        self._pager.watcher = watcher

    def acquire(self, layer: int, ids: Ints, slots: Slots) -> None:
        """Check the layer's weights and the ids, then acquire the pages from the pager.

        Raises:
            UnsupportedError: A weight of the layer has been changed, an id is not that of an
                expert, or another thread is in a compiled pass.
        """
        self._lock.claim()
        for weight, alias, version in self._weights[layer]:
            if alias._version != version or not isinstance(weight, Sealed):
                raise _changed(layer)
        if ids.dtype.kind not in "iu" or any_negative(ids):
            raise _no_experts(layer)
        try:
            self._pager.acquire(layer, ids, slots)
        except IndexError as error:
            raise _no_experts(layer) from error


@jit
def any_negative(ids: Ints) -> bool:
    """True if a number is below zero. For few numbers, this is several times as fast as numpy."""
    for number in ids:  # noqa: SIM110
        if number < 0:
            return True
    return False


def _changed(layer: int) -> UnsupportedError:
    return UnsupportedError(
        f"the experts' weights of layer {layer} were changed while the model was paged",
        fix="close() its handle, and page or load the model again",
    )


def _no_experts(layer: int) -> UnsupportedError:
    return UnsupportedError(
        f"layer {layer} was called with numbers that are not those of its experts",
        fix="give integers from 0 to the number of its experts minus one",
    )
