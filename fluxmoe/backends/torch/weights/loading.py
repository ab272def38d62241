"""Loading of a model's experts into a store by ``transformers``, one expert at a time.

For each parameter, ``transformers`` first collects the checkpoint's tensors without reading them.
Then it calls the ``convert`` method of a *transform*, which reads the tensors and makes the
parameter. This module intercepts both calls. Once it has the transforms of both parts of a layer,
it calls them for each expert, with the tensors of this expert only. Transforms that treat experts
in another way make the weights of the whole layer. Experts that the store has from an earlier
start are not read.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.torch import layout
from fluxmoe.backends.torch.experts import absent
from fluxmoe.backends.torch.names import NAMES
from fluxmoe.stores.host import HostStore
from fluxmoe.stores.tiers import TieredStore

NAMES.require("loading")  # the imports below would raise an error without a remedy

from transformers import core_model_loading as transforms

_read, _spawn = transforms._materialize_copy, transforms.spawn_materialize


class TransformLoading:
    """The loading of one model's experts.

    Args:
        store: An empty store, which has all experts once the model is loaded.
    """

    def __init__(self, store: HostStore | TieredStore) -> None:
        self._store = store
        #: Name of a parameter → the number of its layer, the layer, and the name of the part.
        self._places: dict[str, tuple[int, torch.nn.Module, str]] = {}
        #: Layer → part → its transform, until the transforms of all parts are known.
        self._waiting: dict[int, dict[str, _Call]] = {}

    @contextmanager
    def during(self) -> Iterator[None]:
        """Take the experts of the model that this thread loads within the ``with`` block."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def convert(self, call: _Call) -> dict[str, Any]:
        """Call a transform, or pass the experts that it makes to the store.

        Returns:
            Name → parameter, for the model; empty if the transform makes experts.
        """
        if not self._places:
            self._find(call.settings["model"])
        if call.target not in self._places:
            return call.make()
        index, layer, part = self._places[call.target]
        # Otherwise transformers would initialise the parameter.
        call.settings["loading_info"].missing_keys.discard(call.target)
        calls = self._waiting.setdefault(index, {})
        calls[part] = call
        if len(calls) == len(layout.PARTS):
            self._put_layer(index, layer, self._waiting.pop(index))
        return {}

    def _find(self, model: torch.nn.Module) -> None:
        names = {module: name for name, module in model.named_modules()}
        for index, layer in enumerate(layout.experts_of(model)):
            for part, weight in layout.weights_of(layer).items():
                self._places[f"{names[layer]}.{part}"] = index, layer, part
                stand_in = absent(weight)
                stand_in._is_hf_initialized = True
                setattr(layer, part, stand_in)

    def _put_layer(self, index: int, layer: torch.nn.Module, calls: dict[str, _Call]) -> None:
        """Put those experts of a layer that the store lacks."""
        weights = layout.weights_of(layer)
        experts = len(weights[layout.PARTS[0]])
        first = index * experts
        missing = [expert for expert in range(experts) if not self._store.claim(first + expert)]
        separable = all(call.is_separable(experts) for call in calls.values())
        made: dict[str, torch.Tensor] = {}
        for expert in missing:
            if separable or not made:
                made = {
                    part: calls[part].make_one(expert) if separable else calls[part].make_all()
                    for part in layout.PARTS
                }
            found = {
                part: (experts, *each.shape[1:]) if separable else tuple(each.shape)
                for part, each in made.items()
            }
            wrong = [part for part in found if found[part] != weights[part].shape]
            for part in wrong:
                calls[part].report(found[part], weights[part].shape)
            if wrong:
                return
            row = 0 if separable else expert
            self._store.put(first + expert, [as_rows(each)[row] for each in made.values()])


class _Call(NamedTuple):
    """A call of a transform's method ``convert``.

    Attributes:
        convert: The method.
        transform: The transform, with the tensors of the checkpoint by source pattern.
        target: Name of the parameter that the transform makes.
        settings: Further arguments.
    """

    convert: Callable[..., dict[str, Any]]
    transform: Any
    target: str
    settings: dict[str, Any]

    def make(self) -> dict[str, Any]:
        """Make the parameters."""
        return self.convert(self.transform, self.target, **self.settings)

    def make_all(self) -> torch.Tensor:
        """Make the weights of all experts, ``[experts, …]``."""
        return self._only(self.make())

    def make_one(self, expert: int) -> torch.Tensor:
        """Make the weights of one expert, ``[1, …]``."""
        part = copy.copy(self.transform)
        part.collected_tensors = {
            pattern: [tensors[0].row(expert) if self._renames else tensors[expert]]
            for pattern, tensors in self.transform.collected_tensors.items()
        }
        return self._only(self.convert(part, self.target, **self.settings))

    def is_separable(self, experts: int) -> bool:
        """Return True if the transform can make each expert from this expert's tensors."""
        given = list(self.transform.collected_tensors.values())
        if self._renames:
            return [[len(tensor) for tensor in tensors] for tensors in given] == [[experts]]
        merge, *others = self.transform.operations
        return (
            isinstance(merge, transforms.MergeModulelist)
            and merge.dim == 0
            and all(isinstance(each, transforms.Concatenate) and each.dim == 1 for each in others)
            and len(self.transform.target_patterns) == 1
            and all(len(tensors) == experts for tensors in given)
        )

    def report(self, found: Sequence[int], wanted: Sequence[int]) -> None:
        """Report a parameter whose shape in the checkpoint differs from its shape in the model."""
        self.settings["loading_info"].mismatched_keys.add((self.target, found, wanted))

    @property
    def _renames(self) -> bool:
        """True if the checkpoint has the parameter as it is, possibly under another name."""
        return isinstance(self.transform, transforms.WeightRenaming)

    def _only(self, made: dict[str, Any]) -> torch.Tensor:
        [weight] = made.values()
        found: torch.Tensor = weight[0] if isinstance(weight, list) else weight
        return found


class _Tensor:
    """A tensor of the checkpoint, which is read when the object is called."""

    def __init__(self, tensor: Any, device: Any, dtype: torch.dtype | None) -> None:
        self._tensor, self._device, self._dtype = tensor, device, dtype

    def __call__(self) -> torch.Tensor:
        return _read(self._tensor, self._device, self._dtype)

    def __len__(self) -> int:
        return int(self._tensor.get_shape()[0])

    def row(self, expert: int) -> _Tensor:
        """Select one expert, ``[1, …]``, of a tensor that contains all experts."""
        return _Tensor(self._tensor[expert : expert + 1], self._device, self._dtype)


_CURRENT: ContextVar[TransformLoading | None] = ContextVar("_CURRENT", default=None)


def _collect(
    thread_pool: Any, tensor: Any, device: Any = None, dtype: Any = None, **more: Any
) -> Any:
    # Threads are not used, because they would read tensors ahead and keep them in memory.
    if _CURRENT.get() is None:
        return _spawn(thread_pool, tensor, device, dtype, **more)
    return _Tensor(tensor, device, dtype)


def _intercepted(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def convert(self: Any, layer_name: str, **settings: Any) -> dict[str, Any]:
        call, loading = _Call(original, self, layer_name, settings), _CURRENT.get()
        return call.make() if loading is None else loading.convert(call)

    return convert


transforms.spawn_materialize = _collect
for _kind in (transforms.WeightRenaming, transforms.WeightConverter):
    _kind.convert = _intercepted(_kind.convert)
