"""Loading with ``transformers``, with the experts in the store and without random weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from fluxmoe import checkpoint
from fluxmoe.backends.stores import make_store
from fluxmoe.backends.torch import layout
from fluxmoe.backends.torch.experts import can_run_in_waves
from fluxmoe.backends.torch.loader import Ready
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.backends.torch.names import NAMES
from fluxmoe.backends.torch.paged import PagedModel
from fluxmoe.backends.torch.paging import implementation_of, log_start, runtime_for
from fluxmoe.backends.torch.recording import OTHER_POLICY, routers_of
from fluxmoe.backends.torch.settings import Room, fit
from fluxmoe.backends.torch.weights.loading import TransformLoading
from fluxmoe.errors import CheckpointError, ConfigError
from fluxmoe.findings import Findings
from fluxmoe.stores.disk import key

NAMES.require("loader")

#: Arguments of ``from_pretrained`` that may change the weights loaded from the same files.
_TRANSFORMING = ("key_mapping", "trust_remote_code", "variant", "weights_only")


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

    ``transformers`` does the loading, and converts the checkpoint's names, types and layouts. The
    experts go to the store one by one, and the model keeps parameters without memory for them.

    Raises:
        FluxMoEError: See ``loader.load``.
    """
    chosen, name = ready.chosen, ready.name
    dtype = ready.dtype if ready.dtype == "auto" else getattr(torch, ready.dtype)
    planned = on_meta(name, ready.folder, dtype, ready.extra)
    layers = layout.experts_of(planned)
    implementation = implementation_of(planned, layers)
    top_k = layout.top_k_of(layers[0])
    lock, room = ForwardLock(), Room(*layout.describe(layers), top_k)
    weights, found = sum(weight.nbytes for weight in planned.parameters()), Findings()
    config = fit(room, ready.config, found, ready.where, others=weights - room.nbytes)
    found.require()
    assert config is not None
    if chosen.policies.prefetch.predictions:
        routers_of(planned, layers, OTHER_POLICY)
    in_waves = can_run_in_waves(layers, implementation)
    store = make_store(
        config,
        chosen.coders,
        room.geometry,
        room.page_class,
        partial(_key, ready, type(planned).__name__, str(planned.dtype)),
    )
    if not in_waves:
        top_k = None
    runtime = runtime_for(room, store, config, chosen.policies, implementation, lock, top_k)
    try:
        with _loading(name), TransformLoading(store).during():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # rejected below, with the name and shapes
                **ready.extra,
            )
        _require_all(report, name)
        store.finish()
        layers = layout.experts_of(model)
    except BaseException:
        runtime.close()
        raise
    paged = PagedModel(model, layers, runtime, implementation, lock, loaded=True)
    log_start(model, layers[0], runtime, chosen.registry)
    return paged


def _key(ready: Ready, model: str, dtype: str) -> dict[str, object]:
    """Describe the weights; called after ``transformers`` has downloaded the checkpoint."""
    extra = ready.extra
    folder = checkpoint.downloaded(ready.name, extra.get("revision"), extra.get("cache_dir"))
    there = Path(folder, extra.get("subfolder") or "")
    return key.of_files(
        sorted(there.glob("*.safetensors"))
        if extra.get("variant")  # whose files the index does not list
        else checkpoint.weight_files(there),
        packing=f"transformers {transformers.__version__} {model} {dtype}",
        options={name: repr(extra[name]) for name in _TRANSFORMING if name in extra},
    )


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
