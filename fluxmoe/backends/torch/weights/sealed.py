"""The experts' own weights while FluxMoE computes with its copies of them.

An edit of them would be lost or, where the store shares their memory, be mixed with pages copied
before; of a loaded model they have no memory, and sums on the CPU ignore addends without memory. So
they are sealed: their shape and type can be read, everything else is refused. Views of them that
were made before cannot be sealed. They share their weights' version, which is watched. Arrays, and
tensors such as ``weight.data``, share the memory only, of which a checksum is taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterable

import torch

from fluxmoe.backends.sealed import Sealed
from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.paging.event import Slots
from fluxmoe.core.paging.pager import EventWatcher, ExpertPager
from fluxmoe.core.types import Ints
from fluxmoe.errors import UnsupportedError

#: The remedy for most that a paged model refuses.
CLOSE = "close() its handle first; a model from fluxmoe.load() is in its checkpoint"

#: Where the weights of a loaded model are, too: in a store.
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
    """A weight whose memory tensors or arrays from before paging share, by its checksum."""

    def __init__(self, layer: int, weight: torch.nn.Parameter) -> None:
        self._layer, self._weight = layer, weight.detach()
        self._checksum = self._sum()

    @staticmethod
    def among(layers: Iterable[Iterable[torch.nn.Parameter]]) -> list[Shared]:
        """Find such weights, per layer the experts', before anything of FluxMoE refers to them."""
        return [
            Shared(index, weight)
            for index, layer in enumerate(layers)
            for weight in layer
            # One is the weight's, one this expression's.
            if torch._C._storage_Use_Count(weight.untyped_storage()._cdata) > 2
        ]

    def updated(self, layers: Container[int]) -> None:
        """Take over the new values of the weight if it belongs to one of ``layers``."""
        if self._layer in layers:
            self._checksum = self._sum()

    def check(self) -> None:
        """Raise UnsupportedError if the weight has changed."""
        if self._sum() != self._checksum:
            raise _changed(self._layer)

    def _sum(self) -> int:
        return zlib.crc32(as_rows(self._weight).data)


class Watched:
    """A pager that refuses events of layers whose weights were edited through a view.

    Args:
        pager: The pager.
        lock: Lock of the model, which compiled passes claim.
        layers: Per layer the experts' weights, not sealed yet. Edits of inference tensors cannot be
            seen.
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
                for alias in [weight.detach()]  # is not sealed, and shares the version
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
        """As of the pager.

        Raises:
            UnsupportedError: A weight of the layer is not what it was, an id is not an expert's, or
                another thread is in a compiled pass.
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
    """True if a number is below zero; numpy needs several times as long for a few."""
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
        fix="give integers from 0 to the number of its experts less one",
    )
