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
from collections.abc import Container, Iterable

import torch
from torch.autograd.graph import increment_version

from fluxmoe.backends.sealed import Sealed
from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.paging.event import Slots
from fluxmoe.core.paging.pager import Compute, EventWatcher, ExpertPager
from fluxmoe.core.types import Ints
from fluxmoe.errors import UnsupportedError

#: The remedy for most operations that a paged model refuses.
CLOSE = "close() its handle first; after fluxmoe.load(), use the weights in the checkpoint"

#: Results that place the weights on the CPU, even for a loaded model, whose weights are in a store.
_IN_MEMORY = {
    torch.Tensor.device.__get__: torch.device("cpu"),
    torch.Tensor.is_cpu.__get__: True,
    torch.Tensor.is_meta.__get__: False,
}


class Paged(Sealed):
    """Weights of a paged model."""

    place = _IN_MEMORY
    fix = f"{CLOSE}; choose the experts implementation before paging"


class Gone(Sealed):
    """Weights of a loaded model whose handle was closed."""

    what = (
        "the model's experts are gone: fluxmoe.load() put them into a store, which was released "
        "when the handle was closed"
    )
    fix = "load the model again, and close the handle after its last use"


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
            if _is_shared(weight.untyped_storage())
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


def _is_shared(storage: torch.UntypedStorage) -> bool:
    """Return True if other objects, such as arrays, may refer to the memory."""
    # The weight has one reference, and ``storage`` has another.
    return torch._C._storage_Use_Count(storage._cdata) > 2 or not storage.resizable()


class Watched:
    """A pager that refuses events for layers whose weights were edited through a view.

    Args:
        pager: The pager.
        lock: Lock with which compiled passes claim the model.
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
        self._weights: list[list[tuple[torch.nn.Parameter, torch.Tensor, int]]] = [
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

    def predict(self, experts: Ints) -> None:
        """Pass predictions to the pager."""
        self._pager.predict(experts)

    def updated(self, layers: Iterable[int]) -> None:
        """Accept new values of these layers' weights, and increment the weights' versions."""
        for layer in layers:
            for index, (weight, alias, _) in enumerate(self._weights[layer]):
                increment_version(alias)  # numpy has written the values
                self._weights[layer][index] = weight, alias, alias._version

    def acquire(self, layer: int, ids: Ints, slots: Slots) -> None:
        """Check the layer's weights and the ids, then acquire the pages from the pager.

        Raises:
            UnsupportedError: A weight of the layer has been changed, an id is not that of an
                expert, or another thread is in a compiled pass.
        """
        self._require_sound(layer, ids)
        try:
            self._pager.acquire(layer, ids, slots)
        except IndexError as error:
            raise _no_experts(layer) from error

    def run(self, layer: int, ids: Ints, slots: Slots, compute: Compute) -> None:
        """Check as ``acquire`` does, then let the pager run the layer.

        Raises:
            UnsupportedError: See ``acquire``; or the pass is compiled: the self-check does not
                cover the kernels that a compiler generates.
        """
        self._require_sound(layer, ids)
        if self._lock.compiled_pass:
            raise UnsupportedError(
                "a compiled model cannot run layers in waves",
                fix="give memory for one layer's experts, or do not compile the model",
            )
        try:
            self._pager.run(layer, ids, slots, compute)
        except IndexError as error:
            raise _no_experts(layer) from error

    def _require_sound(self, layer: int, ids: Ints) -> None:
        self._lock.claim()
        for weight, alias, version in self._weights[layer]:
            if alias._version != version or not isinstance(weight, Sealed):
                raise _changed(layer)
        if ids.dtype.kind not in "iu" or any_negative(ids.reshape(-1)):
            raise _no_experts(layer)


@jit
def any_negative(ids: Ints) -> bool:
    """Return True if a number is negative. For few numbers, this is faster than numpy."""
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
