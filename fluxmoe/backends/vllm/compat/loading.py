"""vLLM's loading of a checkpoint, without reading tensors that are not needed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open

from fluxmoe.backends.vllm.names import NAMES
from fluxmoe.inventory import natural

NAMES.require("loading")  # the imports below would raise an error without a remedy

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

#: vLLM's load formats whose loader passes the tensors to the model one by one.
_FORMATS = ("auto", "hf", "mistral", "npcache", "pt", "safetensors")
#: Load format under which ``StreamingLoader`` is registered with vLLM.
_NAME = "fluxmoe"
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Receiver(Protocol):
    """A receiver of the weights of a model that is being loaded."""

    def begin(self, model: torch.nn.Module) -> None:
        """Prepare the model before its weights are loaded."""

    def open(self, files: Sequence[Path]) -> bool:
        """Record the files of the checkpoint; return True if some tensors need not be read."""

    def known(self, name: str, dimensions: int) -> bool:
        """Return True if a tensor of the checkpoint need not be read.

        Args:
            name: Name of the tensor in the checkpoint.
            dimensions: Number of dimensions of the tensor.
        """


class _Current(NamedTuple):
    receiver: Receiver
    load_format: str


_CURRENT: ContextVar[_Current] = ContextVar("_CURRENT")


@register_model_loader(_NAME)
class StreamingLoader(DefaultModelLoader):
    """vLLM's loader; tensors that need not be read are passed to the model on the meta device."""

    def __init__(self, load_config: Any) -> None:
        self._receiver, load_format = _CURRENT.get()
        super().__init__(replace(load_config, load_format=load_format))

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load the weights after the receiver has prepared the model."""
        self._receiver.begin(model)
        super().load_weights(model, model_config)

    def _get_weights_iterator(self, source: Any) -> Any:
        _, names, safetensors, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        files = [Path(name) for name in names]
        if not self._receiver.open(files) or not safetensors:
            return super()._get_weights_iterator(source)
        self.counter_before_loading_weights = time.perf_counter()
        # In vLLM's order, because the last of two tensors with the same name counts.
        files.sort(key=lambda path: natural(path.name))
        return ((source.prefix + name, tensor) for name, tensor in self._needed(files))

    def _needed(self, files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
        for path in files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    about = file.get_slice(name)
                    shape, dtype = about.get_shape(), _TYPES.get(about.get_dtype())
                    if dtype is not None and self._receiver.known(name, len(shape)):
                        yield name, torch.empty(shape, dtype=dtype, device="meta")
                    else:
                        yield name, file.get_tensor(name)


@contextmanager
def streaming(load_config: Any, receiver: Receiver) -> Iterator[None]:
    """Make vLLM load a model through ``StreamingLoader`` within the ``with`` block.

    Args:
        load_config: vLLM's load configuration, for which ``streams`` is true; restored afterwards.
        receiver: Receives the weights.
    """
    load_format = load_config.load_format
    token = _CURRENT.set(_Current(receiver, load_format))
    load_config.load_format = _NAME
    try:
        yield
    finally:
        load_config.load_format = load_format
        _CURRENT.reset(token)


def streams(load_config: Any) -> bool:
    """Return True if the loader for this configuration passes tensors to the model one by one."""
    return load_config.load_format in _FORMATS
