"""``fluxmoe.page``: a Hugging Face model whose experts live in a given amount of memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fluxmoe import config as fluxmoe_config
from fluxmoe.backends import op
from fluxmoe.backends.recorder import Recorder
from fluxmoe.backends.runtime import KVNeed, Runtime
from fluxmoe.backends.tensors import as_rows, as_weight
from fluxmoe.backends.torch import experts, layout, recording
from fluxmoe.core.substrate.cpu import frame_bytes_for
from fluxmoe.core.tenants import frames_for
from fluxmoe.core.types import Geometry, PageClass, Phase
from fluxmoe.errors import BudgetTooSmallError, ConfigError, UnsupportedError
from fluxmoe.sim.trace import StepRows, TraceMeta
from fluxmoe.stores.host import HostStore

PolicySpec = str | Mapping[str, Any]

_WHERE = "fluxmoe.page"


def page(
    model: torch.nn.Module,
    memory: int | str = "4GiB",
    *,
    eviction: PolicySpec = "next-use",
    prefetch: PolicySpec = "none",
    plugins: Sequence[str] = (),
    banks: int = 1,
    copy_threads: int = 1,
    strict_policies: bool = False,
    seed: int = 0,
) -> PagedModel:
    """Page the experts of a model, in place. Its outputs stay what they were, bit for bit.

    Args:
        model: A Hugging Face model on the CPU.
        memory: Room for expert pages, bytes or "4GiB"; at least one layer's experts. More than
            all experts need is not used.
        eviction: Eviction policy, a name or ``{kind: name, option: value}``.
        prefetch: Prefetch policy, likewise.
        plugins: Files (``.py``) or modules that register policies.
        banks: Banks that consecutive layers are spread over at least.
        copy_threads: Threads that copy pages beside the caller's.
        strict_policies: Raise when a policy fails, instead of falling back to LRU.
        seed: Of the policies' random numbers.

    Raises:
        NoExpertsError: The model has no MoE layers.
        UnsupportedError: Its experts cannot be paged, or computed by slot.
        ConfigError: An argument has an unusable value, or the model is already paged.
        BudgetTooSmallError: ``memory`` cannot hold one layer's experts.
        UnknownPolicyError, PluginLoadError, NeedsFutureError: The policies cannot be had.
    """
    if any(experts.is_bound(module) for module in model.modules()):
        raise ConfigError(
            "the model is already paged", where=_WHERE, fix="close() its handle first"
        )
    layers = layout.experts_of(model)
    implementation = _implementation(model, layers)
    geometry, page_class = layout.describe(layers)
    config = fluxmoe_config.parse(
        {
            "memory": {"budget": memory, "kv": {"max": 0}, "banks": banks},
            "eviction": eviction if isinstance(eviction, str) else dict(eviction),
            "prefetch": prefetch if isinstance(prefetch, str) else dict(prefetch),
            "plugins": list(plugins),
            "copy_threads": copy_threads,
            "strict_policies": strict_policies,
            "seed": seed,
        },
        where=_WHERE,
    )
    phase = _Phase()
    store = HostStore(geometry, page_class)
    for layer in layers:
        store.adopt([as_rows(weight) for weight in layout.weights_of(layer).values()])
    runtime = Runtime(
        _fitted(config, geometry, page_class),
        geometry,
        page_class,
        store,
        KVNeed(0, 0, "the KV cache is the model's own"),
        bank_limit=experts.GROUPED_MM_SLOTS if implementation == "grouped_mm" else None,
        phase=phase,
    )
    return PagedModel(model, layers, runtime, implementation, phase)


class PagedModel:
    """The handle of a paged model. Use it as a context manager, or call ``close``.

    The model itself is used as before; it stays paged if the handle is dropped without ``close``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: list[torch.nn.Module],
        runtime: Runtime,
        implementation: str,
        phase: _Phase,
    ) -> None:
        self.model, self._layers, self._runtime = model, layers, runtime
        self._previous, self._phase = model.get_experts_implementation(), phase
        self._handle = handle = op.attach(runtime.pager)
        # A model that is dropped while paged takes its arenas with it.
        lease = experts.Lease()
        self._release = weakref.finalize(lease, _release, handle, runtime)
        table = torch.from_numpy(runtime.pager.table.expert_table)
        for index, layer in enumerate(layers):
            weights = layout.weights_of(layer)
            arenas = {
                part: as_weight(rows, weight)
                for (part, weight), rows in zip(weights.items(), runtime.arenas(index), strict=True)
            }
            experts.bind(layer, handle, index, implementation, arenas, table[index], lease)
        self._hook = model.base_model.register_forward_pre_hook(phase.watch, with_kwargs=True)
        experts.register()
        model.set_experts_implementation(experts.NAME)
        if any(layer.config._experts_implementation != experts.NAME for layer in layers):
            del lease
            self.close()
            # transformers looks for its experts interface in the source of the model's class.
            raise UnsupportedError(
                f"{type(model).__name__} does not let its experts implementation be chosen",
                fix="use the class of transformers itself, not one derived from it",
            )

    @property
    def closed(self) -> bool:
        """Whether the model has been put back."""
        return not self._release.alive

    def stats(self) -> dict[str, int | float]:
        """Counters of the event rule, sizes in bytes, and time spent waiting for pages."""
        return self._open().stats()

    @contextmanager
    def record(
        self,
        path: str | PathLike[str],
        *,
        weights: bool = False,
        predict: bool = False,
        max_steps: int | None = None,
        phase: Phase | None = None,
        replace: bool = True,
    ) -> Iterator[Recorder]:
        """Write the routing of every step inside the ``with`` block to a trace.

        The simulator starts cold: call ``reset`` before, to compare its counters with ``stats``.

        Args:
            path: The file to make.
            weights: Also record the routing weights.
            predict: Also record what the next layer's router makes of this layer's hidden states.
            max_steps: Leave out all that comes after so many steps.
            phase: Leave out steps that do anything else.
            replace: Whether an existing file may be replaced.

        Raises:
            TraceError: The file cannot be written, or nothing was recorded.
            UnsupportedError: ``predict``, and the model's routers were not found.
        """
        pager = self._open().pager
        if pager.watcher is not None:
            raise ConfigError("a recording is under way", where=str(path), fix="end it first")
        columns = {"weights": weights, "predicted": predict}
        notes = recording.notes(
            self.model, self._layers, self._handle, weights=weights, predict=predict
        )
        with Recorder(
            str(path),
            self._trace_meta(),
            columns=[name for name, wanted in columns.items() if wanted],
            replace=replace,
            max_steps=max_steps,
            phase=phase,
            rows=self._phase.rows,
        ) as recorder:
            try:
                op.record(self._handle, recorder)
                for layer, note in zip(self._layers, notes, strict=True):
                    experts.set_note(layer, note)
                yield recorder
            finally:
                if not self.closed:
                    op.record(self._handle, None)
                    for layer in self._layers:
                        experts.set_note(layer, None)

    def reset(self) -> None:
        """Start cold: no page resident, counters zero, policies as new."""
        self._open().pager.reset()

    def check(self) -> None:
        """Raise InvariantError unless all books agree."""
        self._open().check()

    def close(self) -> None:
        """Put the model back exactly as it was, and give the memory back. Idempotent."""
        if self.closed:
            return
        self._hook.remove()
        self.model.set_experts_implementation(self._previous)
        for layer in self._layers:
            experts.release(layer)
        self._release()

    def __enter__(self) -> PagedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> Runtime:
        if self.closed:
            raise ConfigError("the model is not paged any more: its handle was closed")
        return self._runtime

    def _trace_meta(self) -> TraceMeta:
        config = self._layers[0].config
        top_k = getattr(config, "num_experts_per_tok", None)
        if top_k is None:
            raise UnsupportedError(
                f"{type(config).__name__} does not tell num_experts_per_tok, so no trace of it "
                "can be recorded"
            )
        name = getattr(config, "name_or_path", "") or type(self.model).__name__
        return self._runtime.trace_meta(model=str(name), top_k=int(top_k), source="torch")


class _Phase:
    """What the running forward pass does, seen from the length of its input.

    A compiled model does not run hooks between steps: all its steps count as decode.
    """

    def __init__(self) -> None:
        self._now = Phase.DECODE
        self._shape: tuple[int, int] | None = None

    def __call__(self) -> Phase:
        return self._now

    def rows(self, tokens: int) -> StepRows | None:
        """The running step's tokens, requests being rows of the batch; None if nobody saw it."""
        shape, self._shape = self._shape, None
        if shape is None or shape[0] * shape[1] != tokens:
            return None
        request = np.repeat(np.arange(shape[0], dtype=np.int32), shape[1])
        return StepRows(request, np.full(tokens, self._now, np.int8))

    def watch(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        if torch.compiler.is_compiling():
            return
        for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
            if value is not None:
                self._shape = (value.shape[0], value.shape[1])
                self._now = Phase.PREFILL if value.shape[1] > 1 else Phase.DECODE
                return


def _release(handle: int, runtime: Runtime) -> None:
    op.detach(handle)
    runtime.close()


def _implementation(model: torch.nn.Module, layers: list[torch.nn.Module]) -> str:
    """Who computes the experts now, and will go on to do so."""
    if not hasattr(model, "set_experts_implementation"):
        raise UnsupportedError(
            f"{type(model).__name__} is no model of transformers >= 5",
            fix="page the model inside, or load it with transformers",
        )
    found = {layer.config._experts_implementation or experts.EAGER for layer in layers}
    if len(found) > 1 or not found <= set(experts.IMPLEMENTATIONS):
        raise UnsupportedError(
            f"experts computed by {', '.join(sorted(found))} cannot be paged",
            fix=f"model.set_experts_implementation() to {', '.join(experts.IMPLEMENTATIONS)}",
        )
    return found.pop()


def _fitted(
    config: fluxmoe_config.Config, geometry: Geometry, page_class: PageClass
) -> fluxmoe_config.Config:
    """The configuration with a budget that is neither too small nor more than can be used."""
    budget = int(config.memory.budget)
    frame = frame_bytes_for(min(budget, geometry.num_pages * page_class.nbytes))
    least = frames_for(page_class, geometry.experts_per_layer, frame) * frame
    if budget < least:
        raise BudgetTooSmallError(
            f"{budget} bytes cannot hold one layer of {geometry.experts_per_layer} experts, "
            f"{page_class.nbytes} bytes each",
            where=f"memory of {_WHERE}",
            fix=f"give at least {least} bytes",
        )
    useful = min(budget, frames_for(page_class, geometry.num_pages, frame) * frame)
    memory = config.memory.model_copy(update={"budget": useful, "frame": frame})
    return config.model_copy(update={"memory": memory})
