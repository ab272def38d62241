"""``fluxmoe.load``: load a checkpoint with its experts directly into the store.

``transformers`` does the loading, including names, types and layouts of checkpoints. FluxMoE hooks
the registration of parameters: as soon as a layer's experts are complete, the store takes them
over, and the model keeps a parameter without memory.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.modules.module import register_module_parameter_registration_hook

from fluxmoe import arguments, checkpoint
from fluxmoe.arguments import wrong
from fluxmoe.backends.budget import require_for_weights
from fluxmoe.backends.stores import make_coders, make_store, require_room
from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.torch import layout, pretrained
from fluxmoe.backends.torch.experts import absent, require_sound
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.backends.torch.names import NAMES
from fluxmoe.backends.torch.paged import PagedModel
from fluxmoe.backends.torch.paging import implementation_of, log_start, runtime_for
from fluxmoe.backends.torch.settings import HOST, Room, StoreSpec, settings
from fluxmoe.config import Config
from fluxmoe.core.types import Bytes
from fluxmoe.errors import ConfigError, UnsupportedError
from fluxmoe.findings import Findings
from fluxmoe.plugins import PolicySpec, Registry
from fluxmoe.plugins import load as plugin_registry

NAMES.require("loader")

_WHERE = "fluxmoe.load"

#: Arguments of ``from_pretrained`` that FluxMoE sets.
_OURS = ("config", "device_map", "dtype", "ignore_mismatched_sizes", "output_loading_info",
         "quantization_config", "state_dict", "torch_dtype", "use_safetensors")  # fmt: skip


def load(
    path: str | os.PathLike[str],
    memory: int | str = "4GiB",
    *,
    dtype: str | torch.dtype = "auto",
    options: Mapping[str, Any] | None = None,
    eviction: PolicySpec = "next-use",
    prefetch: PolicySpec = "none",
    stores: Sequence[StoreSpec] = HOST,
    plugins: str | Sequence[str] = (),
    banks: int = 1,
    copy_threads: int = 1,
    strict_policies: bool = False,
    seed: int = 0,
) -> PagedModel:
    """Load a causal language model whose experts are paged from the start.

    Its outputs are the same as with ``AutoModelForCausalLM.from_pretrained``. The experts are never
    held outside the store, except for the layer being read. The returned handle has the model as
    ``model``, which has no experts without the handle.

    Args:
        path: A folder with a checkpoint in safetensors, or a name on the Hub.
        memory: Memory for expert pages, as for ``fluxmoe.page``; excludes the store.
        dtype: Type of the weights, such as "bfloat16"; "auto": the checkpoint's.
        options: Further arguments for ``from_pretrained``, such as ``experts_implementation``,
            ``attn_implementation``, ``revision`` or ``trust_remote_code``.
        eviction, prefetch, stores, plugins, banks, copy_threads, strict_policies, seed: As for
            ``fluxmoe.page``.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged, lacks weights for a part
            of the model (where ``transformers`` only warns and uses random ones), or has weights of
            a different shape.
        UnsupportedError: The checkpoint is quantised or its architecture is unknown.
        NoExpertsError, ConfigError, BudgetTooSmallError, UnknownPolicyError,
            PluginLoadError, NeedsFutureError: As for ``fluxmoe.page``, and before weights are read.
    """
    config = settings(
        _WHERE,
        memory,
        eviction=eviction,
        prefetch=prefetch,
        stores=stores,
        plugins=plugins,
        banks=banks,
        copy_threads=copy_threads,
        strict_policies=strict_policies,
        seed=seed,
    )
    if isinstance(path, torch.nn.Module):
        raise wrong("path", "a folder or a name", path, _WHERE, "page a model with fluxmoe.page")
    arguments.path(path, "path", where=_WHERE)  # "./x" must remain a path, not become a name
    return load_configured(
        os.fspath(path),
        config,
        plugin_registry(config.plugins),
        dtype=dtype,
        options=options,
    )


def load_configured(
    name: str,
    config: Config,
    registry: Registry,
    *,
    dtype: str | torch.dtype = "auto",
    options: Mapping[str, Any] | None = None,
) -> PagedModel:
    """``load`` with its settings as a configuration, and the plugins that it names loaded."""
    if options is not None and not isinstance(options, Mapping):
        raise wrong("options", "a map of arguments for from_pretrained", options, _WHERE)
    extra, dtype = dict(options or {}), pretrained.type_of_weights(dtype)
    folder = checkpoint.downloaded(name, extra.get("revision"), extra.get("cache_dir"))
    found = Findings()
    found.errors += [
        ConfigError(f"{key} cannot be set", where=f"options of {_WHERE}", fix="leave it out")
        for key in _OURS
        if key in extra
    ]
    with found.check():
        registry.check(config)
    with found.check():
        checkpoint.require_readable(folder)
    found.require()
    policies, coders = registry.policies(config), make_coders(config, registry)
    planned = pretrained.on_meta(name, folder, dtype, extra)
    layers = layout.experts_of(planned)
    implementation = implementation_of(planned, layers)
    require_sound(layers[0], implementation)
    lock = ForwardLock()
    room = Room(*layout.describe(layers))
    resolved = room.fit(config, _WHERE)
    experts = room.geometry.num_pages * room.page_class.nbytes
    weights = sum(weight.nbytes for weight in planned.parameters())
    with found.check():
        require_for_weights(resolved, experts=experts, others=weights - experts)
    with found.check():
        require_room(resolved, experts)
    found.require()
    store = make_store(resolved, room.geometry, room.page_class, coders)
    runtime = runtime_for(room, store, resolved, policies, implementation, lock)
    try:
        with pretrained.loading(name), _Catch(store.adopt) as caught, pretrained.one_at_a_time():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # rejected below, with name and shapes
                **extra,
            )
        pretrained.require_all(report, name)
        layers = layout.experts_of(model)
        caught.finish(layers)
    except BaseException:
        runtime.close()
        raise
    paged = PagedModel(model, layers, runtime, implementation, lock, loaded=True)
    log_start(model, layers[0], runtime, registry)
    return paged


class _Catch:
    """Takes the experts' weights from the modules into which this thread loads them.

    A layer is passed on as soon as it and those before it are complete, so that stores that encode
    the weights need not wait for all of them. The layers are ordered as the model was built, on the
    meta device before loading.

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
            UnsupportedError: The model was not built in this order.
            FluxMoEError: Raised by ``adopt``.
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
        """Pass on complete layers; errors wait for ``finish``: transformers would change them."""
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
    """Copy to separate memory.

    On the heap, memory used to assemble a layer would leave holes between the layers; rows that are
    a view of the checkpoint's file would change or be lost with the file.
    """
    memory = mmap.mmap(-1, rows.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(memory, np.uint8).reshape(rows.shape)
    np.copyto(copy, rows)
    return copy
