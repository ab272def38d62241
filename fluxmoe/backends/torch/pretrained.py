"""Loading with ``transformers``, with the experts in the store and without random weights."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch.nn.modules.module import register_module_parameter_registration_hook

from fluxmoe import checkpoint
from fluxmoe.backends.stores import make_store
from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.torch import layout
from fluxmoe.backends.torch.experts import absent, require_sound
from fluxmoe.backends.torch.loader import Ready
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.backends.torch.names import NAMES
from fluxmoe.backends.torch.paged import PagedModel
from fluxmoe.backends.torch.paging import implementation_of, log_start, runtime_for
from fluxmoe.backends.torch.settings import Room, fit
from fluxmoe.core.types import Bytes
from fluxmoe.errors import CheckpointError, ConfigError, UnsupportedError
from fluxmoe.findings import Findings

NAMES.require("loader")


def unpaged(name: str) -> Any:
    """Load a model with ``transformers``, with weights in their stored type, to be paged later.

    Raises:
        CheckpointError: The model cannot be loaded.
        UnsupportedError: The model is quantised, or its architecture is unknown.
    """
    folder = checkpoint.downloaded(name)
    checkpoint.require_readable(folder)
    if os.path.isdir(folder):
        config = checkpoint.read_map(Path(folder) / "config.json")
        checkpoint.refuse_quantised(folder, config)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    except Exception as error:  # the model's own code may raise anything
        raise checkpoint.not_loadable(name, error) from error


def load(ready: Ready) -> PagedModel:
    """Load a model that has passed all checks, with its experts directly into the store.

    ``transformers`` does the loading, and converts the checkpoint's names, types and layouts.
    FluxMoE hooks the registration of parameters: as soon as a layer's experts are complete, the
    store takes the experts over, and the model keeps parameters without memory.

    Raises:
        FluxMoEError: See ``loader.load``.
    """
    chosen, name = ready.chosen, ready.name
    dtype = ready.dtype if ready.dtype == "auto" else getattr(torch, ready.dtype)
    planned = on_meta(name, ready.folder, dtype, ready.extra)
    layers = layout.experts_of(planned)
    implementation = implementation_of(planned, layers)
    lock, room = ForwardLock(), Room(*layout.describe(layers))
    weights, found = sum(weight.nbytes for weight in planned.parameters()), Findings()
    config = fit(room, ready.config, found, ready.where, others=weights - room.nbytes)
    found.require()
    assert config is not None
    require_sound(layers[0], implementation)
    store = make_store(config, room.geometry, room.page_class, chosen.coders)
    runtime = runtime_for(room, store, config, chosen.policies, implementation, lock)
    try:
        with _loading(name), _Catch(store.adopt) as caught, _one_at_a_time():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # rejected below, with the name and shapes
                **ready.extra,
            )
        _require_all(report, name)
        layers = layout.experts_of(model)
        caught.finish(layers)
    except BaseException:
        runtime.close()
        raise
    paged = PagedModel(model, layers, runtime, implementation, lock, loaded=True)
    log_start(model, layers[0], runtime, chosen.registry)
    return paged


def on_meta(
    name: str, folder: str, dtype: str | torch.dtype, extra: dict[str, Any]
) -> torch.nn.Module:
    """Build the model on the meta device, before its weights are read."""
    try:
        config = transformers.AutoConfig.from_pretrained(name, **extra)
    except Exception as error:  # the model's own code may raise anything
        raise checkpoint.not_loadable(name, error) from error
    checkpoint.refuse_quantised(folder, config.to_dict())
    found = config.dtype if dtype == "auto" else dtype
    if found is None:
        raise ConfigError(
            "the checkpoint does not state the type of its weights",
            where=name,
            fix='give their type, such as dtype="bfloat16"',
        )
    how = {
        key: extra[key] for key in ("experts_implementation", "trust_remote_code") if key in extra
    }
    try:
        with torch.device("meta"):
            model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=found, **how
            )
    except Exception as error:  # the model's own code may raise anything
        raise checkpoint.not_buildable(config.model_type, error, name) from error
    return model


class _Catch:
    """A context that takes the experts' weights from the modules into which this thread loads them.

    A layer is passed on as soon as this layer and all layers before it are complete, so that stores
    that encode weights need not wait for the last layer. The order is that in which the layers were
    built on the meta device, before loading.

    Args:
        adopt: Takes over the next layer, uint8 ``[experts, part bytes]`` per part.
    """

    def __init__(self, adopt: Callable[[list[Bytes]], None]) -> None:
        self._adopt = adopt
        self._thread = threading.get_ident()
        self._built: list[torch.nn.Module] = []
        self._rows: dict[tuple[torch.nn.Module, str], Bytes] = {}
        self._adopted: list[torch.nn.Module] = []
        self._error: Exception | None = None

    def __enter__(self) -> _Catch:
        self._hook = register_module_parameter_registration_hook(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def finish(self, layers: list[torch.nn.Module]) -> None:
        """Pass on the remaining layers; ``layers`` are all layers, in order.

        Raises:
            UnsupportedError: The layers were not built in this order.
            FluxMoEError: ``adopt`` raised this error.
        """
        if self._error is not None:
            raise self._error
        if any(a is not b for a, b in zip(self._adopted, layers, strict=False)):
            raise UnsupportedError(
                "the model's layers were not built in the order in which they run",
                fix="load it with transformers and page it with fluxmoe.page()",
            )
        for layer in layers[len(self._adopted) :]:
            self._hand_on(layer)

    def _hand_on(self, layer: torch.nn.Module) -> None:
        self._adopt([self._rows.pop((layer, part)) for part in layout.PARTS])
        self._adopted.append(layer)

    def _hand_on_what_is_whole(self) -> None:
        """Pass on complete layers; keep errors for ``finish``, as transformers would alter them."""
        try:
            for layer in self._built[len(self._adopted) :]:
                if not all((layer, part) in self._rows for part in layout.PARTS):
                    return
                self._hand_on(layer)
        except Exception as error:
            self._error = error

    def _take(
        self, module: torch.nn.Module, name: str, weight: torch.nn.Parameter | None
    ) -> torch.nn.Parameter | None:
        if weight is None or name not in layout.PARTS or threading.get_ident() != self._thread:
            return None
        if weight.is_meta:
            if module not in self._built:
                self._built.append(module)
            return None
        if not layout.is_experts(module):
            return None
        self._rows[module, name] = _kept(as_rows(weight))
        if self._error is None:
            self._hand_on_what_is_whole()
        stand_in = absent(weight)
        vars(stand_in).update(vars(weight))  # otherwise transformers would initialise it
        return stand_in


def _kept(rows: Bytes) -> Bytes:
    """Copy rows to a memory mapping of their own.

    On the heap, freed memory that was used to assemble a layer would leave holes between the
    layers. Without a copy, rows that are a view of the checkpoint's file would be changed or lost
    with the file.
    """
    memory = mmap.mmap(-1, rows.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(memory, np.uint8).reshape(rows.shape)
    np.copyto(copy, rows)
    return copy


def _require_all(report: Mapping[str, Any], name: str) -> None:
    """Reject a model that has random weights in place of missing or mismatched weights."""
    if wrong := sorted(report["mismatched_keys"]):
        key, found, wanted = wrong[0]
        raise CheckpointError(
            f"{key} is {list(found)} in the checkpoint, but {list(wanted)} according to config.json"
            + _and_more(wrong),
            where=name,
            fix="get config.json and weights from the same source",
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"the checkpoint has no weights for {missing[0]}" + _and_more(missing),
            where=name,
            fix="get the complete checkpoint; random weights would replace the missing ones",
        )


def _and_more(items: Sequence[object]) -> str:
    return f", and {len(items) - 1} more" if items[1:] else ""


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Convert loading errors to CheckpointError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load the model: {checkpoint.first_line(error)}",
            where=name,
            fix="use a folder with a Hugging Face checkpoint in safetensors format",
        ) from error


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Disable the threads that read ahead, because they keep the tensors that they have read.

    This also affects other threads that load a model at the same time.
    """
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
