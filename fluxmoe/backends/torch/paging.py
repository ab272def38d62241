"""``fluxmoe.page``: limit the experts of a Hugging Face model to a given amount of memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from fluxmoe.arguments import instance
from fluxmoe.backends import preflight, summary
from fluxmoe.backends.budget import KVNeed
from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.stores import make_store
from fluxmoe.backends.tensors import as_rows
from fluxmoe.backends.torch import experts, layout, recording, twin
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.backends.torch.paged import PagedModel
from fluxmoe.backends.torch.settings import HOST, Room, StoreSpec, fit, settings
from fluxmoe.backends.torch.weights.sealed import Shared
from fluxmoe.config import Resolved
from fluxmoe.core.policy.paging import Policies
from fluxmoe.core.transfer.store import ChangingStore
from fluxmoe.errors import ConfigError, UnsupportedError
from fluxmoe.findings import Findings
from fluxmoe.plugins import PolicySpec, Registry
from fluxmoe.stores.disk import key

_WHERE = "fluxmoe.page"


def page(
    model: torch.nn.Module,
    memory: int | str = "4GiB",
    *,
    eviction: PolicySpec = "next-use",
    prefetch: PolicySpec = "none",
    stores: Sequence[StoreSpec] = HOST,
    plugins: str | Sequence[str] = (),
    banks: int = 1,
    copy_threads: int = 1,
    strict_policies: bool = False,
    seed: int = 0,
) -> PagedModel:
    """Page the experts of a model in place. The model's outputs stay the same, bit for bit.

    Args:
        model: A Hugging Face model on the CPU.
        memory: Memory for expert pages, in bytes or as text such as "4GiB"; at least the experts of
            one layer or, if the implementation supports waves, of one token. Memory beyond the size
            of all experts is not used.
        eviction: Eviction policy: a name, ``{kind: name, option: value}``, or a class or instance
            of ``fluxmoe.EvictionPolicy``, which need not be registered.
        prefetch: Prefetch policy, in the same forms.
        stores: Page stores, as in the configuration: maps with ``kind`` (``host`` or ``file``) and
            options. The model also keeps its own weights; a model from ``fluxmoe.load`` does not.
        plugins: Files (``.py``) or modules that register policies or codecs. A single plugin may be
            given without a list.
        banks: Minimum number of banks; each bank is shared by consecutive layers.
        copy_threads: Number of threads that copy pages, in addition to the caller's.
        strict_policies: Raise an error when a policy fails, instead of falling back to LRU.
        seed: Seed of the policies' random numbers.

    Raises:
        NoExpertsError: The model has no MoE layers.
        UnsupportedError: The experts cannot be paged, or cannot be computed by slot.
        ConfigError: An argument is invalid, or the model is already paged.
        BudgetTooSmallError: ``memory`` is less than its minimum.
        UnknownPolicyError, PluginLoadError, NeedsFutureError: The policies could not be loaded.
        UnknownCodecError, PageFileError: A store cannot be created.
    """
    found = Findings()
    parts = found.result(_parts, model)
    wanted = settings(
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
    chosen = None if wanted is None else preflight.choose(wanted, found)
    config = None if wanted is None or parts is None else fit(parts.room, wanted, found, _WHERE)
    found.require()
    assert parts is not None
    assert config is not None
    assert chosen is not None
    (layers, implementation, room), lock = parts, ForwardLock()
    top_k = layout.top_k_of(layers[0])
    if chosen.policies.prefetch.predictions:
        recording.routers_of(model, layers, recording.OTHER_POLICY)
    if not experts.can_run_in_waves(layers, implementation):
        top_k = None
    shared = Shared.among(layout.weights_of(layer).values() for layer in layers)
    rows = [[as_rows(weight) for weight in layout.weights_of(layer).values()] for layer in layers]
    contents = partial(key.of_contents, rows)
    store = make_store(config, chosen.coders, room.geometry, room.page_class, contents)
    try:
        for layer_rows in rows:
            store.adopt(layer_rows)
        runtime = runtime_for(room, store, config, chosen.policies, implementation, lock, top_k)
    except BaseException:
        store.close()
        raise
    paged = PagedModel(model, layers, runtime, implementation, lock, shared=shared)
    log_start(model, layers[0], runtime, chosen.registry)
    return paged


class _Parts(NamedTuple):
    layers: list[torch.nn.Module]
    implementation: str
    room: Room


def _parts(model: torch.nn.Module) -> _Parts:
    """Check that a model can be paged, and find its expert layers and their sizes."""
    fix = "load a checkpoint with fluxmoe.load"
    instance(model, torch.nn.Module, "model", where=_WHERE, fix=fix)
    if any(experts.is_bound(module) for module in model.modules()):
        raise ConfigError(
            "the model is already paged", where=_WHERE, fix="close() its handle first"
        )
    layers = layout.experts_of(model)
    layout.require_on_cpu(layers)
    weights = [id(weight) for layer in layers for weight in layout.weights_of(layer).values()]
    if len(set(weights)) < len(weights):
        raise UnsupportedError("MoE layers that share experts cannot be paged", fix="clone them")
    room = Room(*layout.describe(layers), layout.top_k_of(layers[0]))
    return _Parts(layers, implementation_of(model, layers), room)


def runtime_for(
    room: Room,
    store: ChangingStore,
    config: Resolved,
    policies: Policies,
    implementation: str,
    lock: ForwardLock,
    top_k: int | None,
) -> Runtime:
    """Create the arenas and the pager for expert layers, whose weights need not be loaded yet.

    Args:
        room: Geometry and page layout of the experts, and bounds of the memory.
        store: Store of the pages.
        config: The resolved configuration.
        policies: The policies.
        implementation: Computing implementation of the experts.
        lock: Lock of the model.
        top_k: Number of experts per token if layers can run in waves; None if they cannot.
    """
    return Runtime(
        config,
        policies,
        room.geometry,
        room.page_class,
        store,
        KVNeed(0, 0, "the KV cache is the model's own"),
        bank_limit=experts.GROUPED_MM_SLOTS if implementation == "grouped_mm" else None,
        top_k=top_k,
        phase=lock.phase,
        ceiling=room.most,
    )


def log_start(
    model: torch.nn.Module, layer: torch.nn.Module, runtime: Runtime, registry: Registry
) -> None:
    """Log the summary of a newly paged model; ``layer`` is one of its expert layers."""
    block = summary.start_block(
        runtime.partition,
        runtime.config,
        model=layout.name_of(model, layer),
        top_k=layout.top_k_of(layer),
        dynamic=False,
        registry=registry,
        store_bytes=runtime.store.nbytes,
    )
    logging.getLogger("fluxmoe").info(block)


def implementation_of(model: torch.nn.Module, layers: list[torch.nn.Module]) -> str:
    """Return the name of the implementation that computes the experts before and after paging."""
    if not hasattr(model, "set_experts_implementation"):
        raise UnsupportedError(
            f"{type(model).__name__} is not a model of transformers >= 5",
            fix="page the wrapped model, or load it with transformers",
        )
    found = {layer.config._experts_implementation or twin.EAGER for layer in layers}
    if len(found) > 1 or not found <= set(twin.IMPLEMENTATIONS):
        raise UnsupportedError(
            f"experts computed by {', '.join(sorted(found))} cannot be paged",
            fix=f"call model.set_experts_implementation() with {' or '.join(twin.IMPLEMENTATIONS)}",
        )
    implementation = found.pop()
    for layer in layers:
        twin.require_stock(layer, implementation)
    return implementation
