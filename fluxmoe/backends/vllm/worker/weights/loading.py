"""Loading of a model's experts into a store, without holding all of them in the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
import vllm

from fluxmoe.backends.tensors import as_rows, pages_of
from fluxmoe.backends.vllm.compat import loading
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.compat.worker import RoutedExperts, get_tensor_model_parallel_rank
from fluxmoe.backends.vllm.worker import checks
from fluxmoe.backends.vllm.worker.layer import PagedRoutedExperts
from fluxmoe.backends.vllm.worker.weights.experts import ExpertStage, NewExperts
from fluxmoe.backends.vllm.worker.weights.streamed import (
    PARTS,
    Shared,
    StreamedMoEMethod,
    streamed_layers,
)
from fluxmoe.core.types import Bytes, Geometry, PageClass
from fluxmoe.errors import NoExpertsError
from fluxmoe.inventory import expert_tensor, layer_number
from fluxmoe.sizes import shown
from fluxmoe.stores.disk import key
from fluxmoe.stores.disk.key import Key
from fluxmoe.stores.host import HostStore
from fluxmoe.stores.tiers import TieredStore

logger = logging.getLogger("fluxmoe")

#: Function that makes an empty store for the weights that a key describes.
MakeStore = Callable[[Geometry, PageClass, Key], HostStore | TieredStore]

#: Increase this number when the same weights result in different pages.
_REVISION = 1
#: Seconds between two progress reports.
_REPORT = 10.0


class ExpertLoading:
    """The loading of one worker's experts.

    Formats whose loader fills the model's parameters directly are loaded as in stock vLLM, and
    the experts are moved to the store afterwards.

    Args:
        config: vLLM's configuration.
        make: Function that makes the store.

    Attributes:
        load_format: The load format in vLLM's configuration.
        layers: The model's MoE layers, in order.
        store: The store, which has all experts after ``during`` and ``collect``.
    """

    layers: list[PagedRoutedExperts]
    store: HostStore | TieredStore

    def __init__(self, config: VllmConfig, make: MakeStore) -> None:
        self._config, self._make = config, make
        self.load_format: str = config.load_config.load_format
        self._files: Sequence[Path] = ()
        #: For each layer, the experts that the store has from an earlier start.
        self._known: list[set[int]] = []
        #: The same sets, by the number of the layer in the checkpoint.
        self._numbered: dict[int, set[int]] = {}
        self._new: list[NewExperts] = []
        self._begun = self._reported = 0.0
        self._packed = self._experts = 0

    @contextmanager
    def during(self) -> Iterator[None]:
        """Take the experts of the model that vLLM loads within the ``with`` block."""
        load = self._config.load_config
        if not loading.streams(load):
            yield
            return
        with streamed_layers(), loading.streaming(load, self):
            try:
                yield
                for new in self._new:
                    new.finish()
                self.store.finish()
            except BaseException:
                self.close()
                raise
        self._new.clear()
        for layer in self.layers:
            layer.incoming = None

    def collect(self, model: torch.nn.Module) -> None:
        """Take the experts of a loaded model if ``during`` has not taken them."""
        if hasattr(self, "store"):
            return
        self.layers = self._layers_of(model)
        rows = [[as_rows(getattr(layer, name)) for name in PARTS] for layer in self.layers]
        contents = partial(key.of_contents, rows, **self._dependencies())
        self.store = self._make(*pages_of(self.layers, PARTS), contents)
        for parts in rows:
            self.store.adopt(parts)

    def close(self) -> None:
        """Close the store after an error. Idempotent."""
        if hasattr(self, "store"):
            self.store.close()

    # --- called by the loader --------------------------------------------------------------------

    def begin(self, model: torch.nn.Module) -> None:
        """Set up the kernels, which determines the layout of the pages."""
        shared: Shared = {}
        for layer in model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, StreamedMoEMethod):
                method.set_up(layer, shared)
        self.layers = self._layers_of(model)
        geometry, page_class = pages_of(self.layers, PARTS)
        self._experts = geometry.experts_per_layer
        first = self.layers[0]
        self._matrices = {first.ckpt_gate_proj_name, first.ckpt_up_proj_name,
                          first.ckpt_down_proj_name}  # fmt: skip
        self.store = self._make(geometry, page_class, self._key_of_files)

    def open(self, files: Sequence[Path]) -> bool:
        """Find the experts that the store has from an earlier start."""
        if self._new:
            return False  # another source of weights for the same model, such as adapters
        self._files = files
        experts, stage = self._experts, ExpertStage(self.layers[0])
        for index, layer in enumerate(self.layers):
            known = {e for e in range(experts) if self.store.claim(index * experts + e)}
            new = NewExperts(layer, stage, partial(self._put, index * experts), known)
            self._known.append(known)
            self._new.append(new)
            layer.incoming = new.take
            number = layer_number(layer.layer_name)
            if number is not None:
                # Modules may have the same number, such as experts for text and for images.
                self._numbered[number] = known & self._numbered.get(number, known)
        self._begun = self._reported = time.monotonic()
        return any(len(known) > 0 for known in self._known)

    def known(self, name: str, dimensions: int) -> bool:
        """Return True if the store has all experts that a tensor of the checkpoint contains."""
        found = expert_tensor(name, dimensions)
        known = None if found is None else self._numbered.get(found.layer)
        if found is None or known is None:
            return False
        if found.expert is None:
            return len(known) == self._experts
        return found.expert in known and found.part in self._matrices

    def _put(self, first: int, expert: int, parts: list[Bytes]) -> None:
        self.store.put(first + expert, parts)
        self._packed += 1
        now = time.monotonic()
        if now - self._reported < _REPORT:
            return
        self._reported = now
        total = sum(self._experts - len(known) for known in self._known)
        rate = self._packed / (now - self._begun)
        nbytes = sum(part.nbytes for part in parts)
        logger.info(
            "%d of %d experts are in the store, %s/s, %.0f s left",
            self._packed, total, shown(int(rate * nbytes)), (total - self._packed) / rate,
        )  # fmt: skip

    def _key_of_files(self) -> dict[str, object]:
        return key.of_files(self._files, **self._dependencies())

    def _dependencies(self) -> dict[str, object]:
        """Return the properties, other than the checkpoint, on which the pages depend."""
        layer, parallel = self.layers[0], self._config.parallel_config
        kernel = layer.quant_method.moe_kernel.fused_experts
        return {
            "architectures": self._config.model_config.architectures,
            "packing": f"vllm {vllm.__version__} {type(kernel).__name__} {layer.params_dtype}",
            "revision": _REVISION,
            "modules": sha256(
                ",".join(layer.layer_name for layer in self.layers).encode()
            ).hexdigest()[:16],
            "rank": [get_tensor_model_parallel_rank(), parallel.tensor_parallel_size],
        }

    def _layers_of(self, model: torch.nn.Module) -> list[PagedRoutedExperts]:
        layers = [each for each in model.modules() if isinstance(each, RoutedExperts)]
        if not layers:
            raise NoExpertsError(
                f"{self._config.model_config.model} has no MoE layers: there is nothing to page",
                fix="serve it without FluxMoE",
            )
        for layer in layers:
            checks.refuse_unpageable(layer)
        return layers
