"""``fluxmoe.load``: load a checkpoint whose experts go directly into the store.

All checks that do not need ``transformers`` run before ``transformers`` is imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxmoe import arguments
from fluxmoe.arguments import wrong
from fluxmoe.backends import preflight, versions
from fluxmoe.backends.preflight import Chosen
from fluxmoe.backends.torch.settings import HOST, Room, StoreSpec, fit, settings
from fluxmoe.config import Config
from fluxmoe.errors import ConfigError
from fluxmoe.findings import Findings
from fluxmoe.plugins import PolicySpec

if TYPE_CHECKING:
    import torch

    from fluxmoe.backends.torch.paged import PagedModel

_WHERE = "fluxmoe.load"

#: Arguments of ``from_pretrained`` that FluxMoE sets.
_OURS = ("config", "device_map", "dtype", "ignore_mismatched_sizes", "output_loading_info",
         "quantization_config", "state_dict", "torch_dtype", "use_safetensors")  # fmt: skip

#: Supported dtype of the experts' weights → bytes of a weight.
_TYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
#: Alias of a dtype → its name.
_SAME = {"half": "float16", "float": "float32", "double": "float64"}


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that has passed all checks made before ``transformers`` loads it.

    Attributes:
        name: Folder or hub name, as given.
        folder: Folder of the model's files if known, else the name.
        config, chosen: The settings, and the policies and codecs that they select.
        dtype: Name of the type of the weights, or ``auto``.
        extra: Further arguments for ``from_pretrained``.
        where: Name of the caller, for errors.
    """

    name: str
    folder: str
    config: Config
    chosen: Chosen
    dtype: str
    extra: dict[str, Any]
    where: str

    def load(self) -> PagedModel:
        """Load the model. Raises the errors of ``fluxmoe.load``."""
        from fluxmoe.backends.torch import pretrained

        return pretrained.load(self)


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

    The model's outputs are the same as those of a model loaded with
    ``AutoModelForCausalLM.from_pretrained``. The experts are never held outside the store, except
    those of the layer being read. The returned handle provides the model as ``model``; once the
    handle is closed, the model has no experts.

    Args:
        path: A folder with a checkpoint in safetensors, or a name on the Hub.
        memory: Memory for expert pages, as for ``fluxmoe.page``; excludes the store.
        dtype: Type of the weights, such as "bfloat16"; "auto" stands for the checkpoint's type.
        options: Further arguments for ``from_pretrained``, such as ``experts_implementation``,
            ``attn_implementation``, ``revision`` or ``trust_remote_code``.
        eviction, prefetch, stores, plugins, banks, copy_threads, strict_policies, seed: As for
            ``fluxmoe.page``.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged, lacks weights for a part
            of the model (``transformers`` alone would only warn, and use random weights), or has
            weights of the wrong shape.
        UnsupportedError: The checkpoint is quantised or its architecture is unknown.
        NoExpertsError, ConfigError, BudgetTooSmallError, UnknownPolicyError,
            PluginLoadError, NeedsFutureError: As for ``fluxmoe.page``; raised before weights are
            read.
    """
    found = Findings()
    fix = "page a model with fluxmoe.page"
    file = found.result(arguments.path, path, "path", where=_WHERE, fix=fix)
    config = settings(
        _WHERE,
        memory,
        found,
        eviction=eviction,
        prefetch=prefetch,
        stores=stores,
        plugins=plugins,
        banks=banks,
        copy_threads=copy_threads,
        strict_policies=strict_policies,
        seed=seed,
    )
    # Not ``file``, in which "./x" has become "x", which could be a name on the Hub.
    name = None if file is None else os.fspath(path)
    ready = prepare(name, config, found, where=_WHERE, dtype=dtype, options=options)
    found.require()
    assert ready is not None
    for note in found.notes:
        logging.getLogger("fluxmoe").info(note)
    return ready.load()


def prepare(
    name: str | None,
    config: Config | None,
    found: Findings,
    *,
    where: str,
    dtype: object = "auto",
    options: Mapping[str, Any] | None = None,
) -> Ready | None:
    """Check everything that can be checked before ``transformers`` is imported.

    Args:
        name: Folder or hub name of the model; None if the given name is invalid.
        config: The settings; None if they are unknown.
        found: Receives errors and notes.
        where: Name of the caller, for errors.
        dtype, options: See ``load``.

    Returns:
        The model, ready to be loaded; None if an error was found.
    """
    with found.check():
        versions.require(versions.TORCH, versions.HF)
    extra, kind = found.result(_extra, options, where), found.result(_dtype, dtype, where)
    chosen = None if config is None else preflight.choose(config, found)
    folder = model = None
    if name is not None and found.reliable("model"):
        given = extra or {}
        folder = preflight.folder_of(
            name,
            os.environ,
            found,
            revision=given.get("revision"),
            cache=given.get("cache_dir"),
        )
        model = None if folder is None else preflight.sizes_of(folder, found)
    if config is not None and model is not None:
        item = _TYPES.get(kind or "", model.weight_bytes)
        room = Room(*model.paged(item), model.top_k)
        fit(room, config, found, where, others=model.other_bytes // model.weight_bytes * item)
    elif config is not None:
        preflight.check_stores(config, 0, found)
    if found.errors:
        return None
    assert name is not None
    assert config is not None
    assert chosen is not None
    assert kind is not None
    return Ready(name, str(folder or name), config, chosen, kind, extra or {}, where)


def _extra(options: object, where: str) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise wrong("options", "a map of arguments for from_pretrained", options, where)
    extra = dict(options or {})
    found = Findings()
    found.errors += [
        ConfigError(f"{key} cannot be set", where=f"options of {where}", fix="leave it out")
        for key in _OURS
        if key in extra
    ]
    found.require()
    return extra


def _dtype(dtype: object, where: str) -> str:
    """Return the name of a type given as text or as a ``torch.dtype``; ``auto`` is accepted."""
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    name = _SAME.get(name, name)
    if name == "auto" or name in _TYPES:
        return name
    raise wrong("dtype", f'"auto" or one of {", ".join(_TYPES)}', dtype, where)
