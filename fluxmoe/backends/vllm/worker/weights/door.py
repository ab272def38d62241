"""The only way to change the weights of a running model.

vLLM's own code loads new weights (names, slices for tensor parallelism, packing), except that
experts end up in the store instead of slots. All checks come first; then the store, the pages and
the other weights change at once. The scheduler drops its prefix cache before its next request
(``board``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fluxmoe import checkpoint
from fluxmoe.backends.interrupts import uninterrupted
from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.vllm.board import Board
from fluxmoe.backends.vllm.compat import reload
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.compat.worker import errors_of_all
from fluxmoe.backends.vllm.worker.layer import PagedRoutedExperts
from fluxmoe.backends.vllm.worker.weights.experts import ExpertStage, NewExperts
from fluxmoe.backends.vllm.worker.weights.state import ModelState
from fluxmoe.backends.vllm.worker.weights.streamed import PARTS
from fluxmoe.backends.weights import FORM, Shape, checked
from fluxmoe.core.transfer.store import Put
from fluxmoe.core.types import Bytes
from fluxmoe.errors import FluxMoEError, UnsupportedError, WeightsError
from fluxmoe.inventory import expert_tensor
from fluxmoe.words import line

_ONE = "one update"


class WeightDoor:
    """The only way to change the weights of a paged model.

    Args:
        model: vLLM's model.
        layers: The model's paged layers, in order.
        runtime: The layers' pager and store.
        config: vLLM's configuration.
        folder: The checkpoint that the model was loaded from.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[PagedRoutedExperts],
        runtime: Runtime,
        config: VllmConfig,
        folder: str,
    ) -> None:
        self._model, self._layers, self._runtime = model, layers, runtime
        self._config, self._folder = config, folder
        self._load: Callable[[Iterable[Any]], Any] = model.load_weights
        self._unfollowing = reload.unfollowing(model)
        self.board = Board()
        #: True during an update. vLLM's loaders may only be called during an update.
        self.open = False

    def update(self, weights: object, *, whole: bool = False) -> set[str]:
        """Replace weights between two steps: all of those given or, after an error, none.

        Args:
            weights: Names and tensors as in the checkpoint, as pairs or a map. Each expert must be
                given as a whole. Of the other weights, either all or none must be given.
            whole: True to require all weights of the model.

        Returns:
            vLLM's names of the parameters that were changed.

        Raises:
            WeightsError: Requests are unfinished, or the weights do not fit. As after every error,
                the old weights remain.
            UnsupportedError: The model cannot change its weights.
            StoreError: A store has no room.
        """
        agreed = False
        before: ModelState | None = None
        with ExitStack() as change:
            try:
                self._require_possible()
                expert_weights = [getattr(layer, name) for layer in self._layers for name in PARTS]
                before = ModelState(self._model, expert_weights)
                with self._runtime.update() as put:
                    changed = self._taken(weights, put, whole)
                    agreed = True
                    if errors := errors_of_all(None):
                        raise errors[0]
                    change.enter_context(uninterrupted())
            except BaseException as error:
                if before is not None:
                    before.restore()
                    for module in self._model.modules():
                        reload.readmit(module)
                if not isinstance(error, FluxMoEError) and isinstance(error, Exception):
                    error = WeightsError(
                        f"the new weights cannot be loaded: {line(error, repr)}", fix=FORM
                    )
                if not agreed:
                    errors_of_all(error)
                raise error
            self.board.updates += 1
        return changed

    def reload(self, weights: object, path: str | None) -> None:
        """Replace weights with ``weights`` or, if None, with a checkpoint's. See ``update``.

        Args:
            weights: New weights, as for ``update``, or None.
            path: Folder of the checkpoint; None for the one that the model was loaded from.

        Raises:
            CheckpointError: The checkpoint is missing, damaged or incomplete.
        """
        if weights is not None:
            self.update(weights)
            return
        if path is not None:
            checkpoint.require_readable(path)
        self.update(reload.weights_of(self._config, self._model, path), whole=True)

    def _require_possible(self) -> None:
        if self.open:
            raise WeightsError(
                "an update of the weights is in progress", fix="end it before the next update"
            )
        if unfinished := self.board.unfinished:
            raise WeightsError(
                f"{unfinished} requests are unfinished: their KV cache is from the old weights",
                fix="finish or abort the requests before changing the weights",
            )
        if self._config.model_config.is_multimodal_model:
            raise UnsupportedError(
                "the weights of a multimodal model cannot be changed yet", fix="restart the server"
            )

    def _taken(self, weights: object, put: Put, whole: bool) -> set[str]:
        """Check and load the weights, and pass the experts to ``put``."""
        shapes = self._shapes()
        given: set[str] = set()
        experts = self._runtime.geometry.experts_per_layer

        def numbered(layer: int) -> Callable[[int, list[Bytes]], None]:
            return lambda expert, parts: put(layer * experts + expert, parts)

        def fused(name: str, weight: torch.Tensor) -> Shape | None:
            """Return the shape of a tensor with all experts of a layer; else None.

            Unknown tensors of single experts are rejected, because vLLM would ignore them.
            """
            found = expert_tensor(name, weight.ndim)
            return (
                None if found is None or found.expert is not None else (experts, *weight.shape[1:])
            )

        def named() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in checked(weights, shapes, fused):
                given.add(name)
                yield name, weight

        stage = ExpertStage(self._layers[0])
        new = [NewExperts(layer, stage, numbered(i)) for i, layer in enumerate(self._layers)]
        with self._loading(new):
            changed = self._load(named())
            count = sum(each.finish() for each in new)
            self._require_others(shapes, given, whole=whole)
            if whole and count < self._runtime.geometry.num_pages:
                missing = self._runtime.geometry.num_pages - count
                raise WeightsError(
                    f"{missing} experts are missing", where=_ONE, fix="use a whole checkpoint"
                )
        return {str(name) for name in changed or ()}

    def _shapes(self) -> dict[str, Shape]:
        """Read the shapes of the tensors in the checkpoint that the model was loaded from."""
        folder = Path(self._folder)
        shapes = {name: each.shape for name, each in checkpoint.headers(folder)}
        if not shapes:
            raise UnsupportedError(
                "the names and shapes of this model's weights are not known",
                where=self._folder,
                fix="start with a checkpoint in safetensors format",
            )
        return shapes

    def _require_others(
        self, shapes: Mapping[str, Shape], given: Iterable[str], *, whole: bool
    ) -> None:
        """Require that all weights other than experts are given, or none of them."""
        others = {name for name, shape in shapes.items() if not expert_tensor(name, len(shape))}
        here = others.intersection(given)
        if not here and not whole:
            return
        if missing := sorted(others - here):
            raise WeightsError(
                f"weights are missing ({len(missing)}), such as {missing[0]}",
                where=_ONE,
                fix="give all weights of the model, or only experts",
            )
        if self._unfollowing:
            raise UnsupportedError(
                f"only the experts of this model can change: vLLM keeps {self._unfollowing[0]}",
                fix="restart the server with the new weights",
            )
        if not self._config.model_config.enforce_eager:
            raise UnsupportedError(
                f"a compiled model cannot change weights other than experts, such as {min(here)}",
                fix="start with enforce_eager",
            )

    @contextmanager
    def _loading(self, new: Sequence[NewExperts]) -> Iterator[None]:
        """Prepare the model for loading; afterwards, copy new values to the old addresses."""
        sealed = [layer._parameters for layer in self._layers]
        self.open = True
        try:
            with reload.set_current_vllm_config(self._config):
                for layer, each in zip(self._layers, new, strict=True):
                    layer._parameters = {**layer._parameters, **each.stand_ins}
                    layer.incoming = each.take
                    reload.exempt(layer)
                reload.initialize_layerwise_reload(self._model)
                yield
                for layer, own in zip(self._layers, sealed, strict=True):
                    layer._parameters = own
                    reload.readmit(layer)
                reload.finalize_layerwise_reload(self._model, self._config.model_config)
                reload.pack_tied(self._model)
        finally:
            self.open = False
            for layer in self._layers:
                layer.incoming = None
