"""The handle of a paged Hugging Face model (``fluxmoe.page``, ``fluxmoe.load``)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike

import torch
from torch.utils.hooks import RemovableHandle

from fluxmoe import arguments, config, sizes
from fluxmoe.backends import op
from fluxmoe.backends.interrupts import uninterrupted
from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.tensors import as_rows, as_weight
from fluxmoe.backends.torch import experts, layout, recording, twin
from fluxmoe.backends.torch.lock import ForwardLock
from fluxmoe.backends.torch.refusals import Refusals, Uncopyable
from fluxmoe.backends.torch.settings import Room, given
from fluxmoe.backends.torch.weights.sealed import Shared, Watched
from fluxmoe.backends.torch.weights.update import NewWeights
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.core.types import Phase
from fluxmoe.errors import ConfigError, UnsupportedError
from fluxmoe.trace.recorder import Recorder


class PagedModel(Uncopyable):
    """The handle of a paged model. Use it as a context manager, or call ``close``.

    The model is used as before; it stays paged if the handle is dropped without ``close``.

    Attributes:
        model: The model.

    Args:
        loaded: True if the model has no expert weights that ``close`` could restore.
        shared: Weights whose edits only ``check`` can detect.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: list[torch.nn.Module],
        runtime: Runtime,
        implementation: str,
        lock: ForwardLock,
        *,
        loaded: bool = False,
        shared: Sequence[Shared] = (),
    ) -> None:
        self._shared = shared
        self.model, self._layers, self._runtime, self._lock = model, layers, runtime, lock
        self._asked: RemovableHandle | None = None
        self._previous, self._loaded = model.get_experts_implementation(), loaded
        weights = [layout.weights_of(layer).values() for layer in layers]
        # The experts' own weights, which the model uses again after close().
        self._own = [] if loaded else [[as_rows(weight) for weight in each] for each in weights]
        self._watched = Watched(runtime.pager, lock, weights)
        self._handle = handle = op.attach(self._watched)
        # If the model is dropped while it is paged, its arenas are freed with it.
        lease = experts.Lease()
        self._release = weakref.finalize(lease, _release, handle, runtime)
        table = torch.from_numpy(runtime.pager.table.expert_table)
        foresee = runtime.pager.predictions
        self._notes = recording.notes(model, layers, handle, lock.turn, predict=foresee)
        self._refusals = Refusals(model, layers)  # sets methods of the layers before ``bind``
        for index, layer in enumerate(layers):
            experts.bind(
                layer,
                handle,
                index,
                implementation,
                self._arenas(index),
                table[index],
                lock,
                lease,
                waves=runtime.partition.in_waves,
            )
        self._show(None, self._notes)
        lock.watch(model)
        experts.register()
        model.set_experts_implementation(experts.NAME)
        if any(layer.config._experts_implementation != experts.NAME for layer in layers):
            del lease
            self.close()
            # transformers searches the source of the model's class for the experts interface.
            raise UnsupportedError(
                f"{type(model).__name__} does not let its experts implementation be chosen",
                fix="use the class from transformers, not a subclass",
            )

    def __repr__(self) -> str:
        name = f"{type(self).__name__}({type(self.model).__name__}"
        if self.closed:
            return f"{name}, closed)"
        runtime = self._runtime
        counters, slots = runtime.pager.counters(), sum(runtime.pager.table.slots)
        hit_rate = f"{counters.hit_rate:.1%}" if counters.accesses else "unused"
        return (
            f"{name}, budget={sizes.shown(runtime.memory.budget_bytes)}, "
            f"slots={slots} of {runtime.geometry.num_pages}, hit_rate={hit_rate})"
        )

    @property
    def closed(self) -> bool:
        """True if the handle has been closed."""
        return not self._release.alive

    @property
    def pager(self) -> ExpertPager:
        """The pager, for measurements."""
        return self._open().pager

    def stats(self) -> dict[str, int | float]:
        """Return the event rule's counters, sizes in bytes, and seconds spent waiting for pages."""
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
        replace: bool = False,
    ) -> Iterator[Recorder]:
        """Write the routing of every step inside the ``with`` block to a trace.

        The simulator starts cold: to compare its counters with ``stats``, call ``reset`` before
        recording.

        Args:
            path: Path of the new trace file.
            weights: Also record the routing weights (not of a compiled model).
            predict: Also record the experts that the next layer's router chooses for this layer's
                hidden states.
            max_steps: Number of steps after which recording stops.
            phase: Record only the steps of this phase.
            replace: Overwrite an existing file.

        Raises:
            TraceError: The file cannot be written, or nothing was recorded.
            ConfigError: The file exists and ``replace`` is false, a recording is already active,
                the handle is closed, or an argument is invalid.
            UnsupportedError: ``predict`` is set, but the model's routers were not found.
        """
        if self._open().pager.watcher is not None:
            raise ConfigError("a recording is already active", where=str(path), fix="end it first")
        recorder, notes = recording.begin(
            self.model,
            self._layers,
            self._runtime,
            self._handle,
            self._lock,
            path,
            weights=weights,
            predict=predict,
            max_steps=max_steps,
            phase=phase,
            replace=replace,
        )
        with recorder:
            try:
                self._lock.alone(partial(self._show, recorder, notes))
                yield recorder
            finally:
                if self._lock.here:
                    self._lock.alone(partial(self._show, None, self._notes))

    def _show(self, recorder: Recorder | None, notes: recording.Notes) -> None:
        if not self.closed:
            recording.show(self._handle, self._layers, recorder, notes)

    def resize(self, memory: int | str) -> None:
        """Change the memory for expert pages, between forward passes.

        Growing keeps all resident pages; shrinking evicts pages chosen by the policy. Outputs do
        not change. A compiled model is recompiled.

        Args:
            memory: As for ``page``. The number of banks does not change.

        Raises:
            ConfigError: The size is invalid or exceeds the free memory.
            BudgetTooSmallError: A bank cannot hold the experts of one layer or, with waves, of one
                token.
            SubstrateError: A system call failed. As after every error, nothing has changed.
        """
        self._resize(memory, "PagedModel.resize")

    def _resize(self, memory: int | str, where: str, *, at_least: bool = False) -> None:
        budget = given(config.parse({"memory": {"budget": memory}}, where=where), where)
        self._lock.alone(partial(self._give, budget, where, at_least))

    def _give(self, budget: int, where: str, at_least: bool) -> None:
        runtime = self._open()
        room = Room(runtime.geometry, runtime.page_class, runtime.partition.minimum)
        if at_least:
            budget = max(budget, room.least * runtime.pager.table.num_banks)
        budget = room.within(budget, where)
        if at_least and budget // room.frame_bytes == runtime.memory.pool.limit:
            return
        with uninterrupted():
            runtime.resize(budget)
            for index, layer in enumerate(self._layers):
                experts.resize(layer, self._arenas(index))

    def follow(self, room: Callable[[], int | str] | None) -> None:
        """Resize the memory for expert pages before each forward pass to the size from ``room``.

        This provides arbitration to callers with their own KV cache. Compiled models do not call
        ``room``.

        Args:
            room: Function that returns a number of bytes, or text such as "4GiB". A size below the
                minimum counts as the minimum. If ``room`` or ``resize`` raises an error, the pass
                does not begin. None stops these calls.

        Raises:
            ConfigError: The handle is closed.
        """
        self._open()
        if room is not None and not callable(room):
            raise arguments.wrong(
                "room",
                "a function that returns a size",
                room,
                "PagedModel.follow",
                "call resize() to set a fixed size",
            )
        if self._asked is not None:
            self._asked.remove()
            self._asked = None
        if room is None:
            return

        def ask(*_: object) -> None:
            if not torch.compiler.is_compiling() and not self.closed:
                wanted = room()
                self._resize(1 if wanted == 0 else wanted, "room", at_least=True)

        # The hook is on the outermost module and runs first, before the pass takes the lock.
        self._asked = self.model.register_forward_pre_hook(ask, prepend=True)

    def update_weights(
        self, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        """Replace weights of the model between forward passes: all that are given, or none.

        Later outputs, and the model after ``close``, are those of a model with the new weights.
        Page files keep the old weights. If a hook calls this method within a pass, the layers that
        follow have the new weights.

        Args:
            weights: Names and tensors as in the ``state_dict`` of the model before paging. Weights
                that are not given keep their values, but a layer's experts must be given as a
                whole.

        Raises:
            WeightsError: The weights do not fit the model.
            StoreError, ConfigError: A store has no room. As after every error, including an error
                raised while ``weights`` is iterated over, nothing has changed.
        """
        self._lock.alone(partial(self._update, weights))

    def _update(self, weights: object) -> None:
        runtime = self._open()
        new = NewWeights(self.model, self._layers)
        with ExitStack() as change:
            with runtime.update() as put:
                new.collect(weights, put)
                change.enter_context(uninterrupted())
            new.take_over(self._own, self._shared)
            self._watched.updated(new.experts if self._own else ())

    def reset(self) -> None:
        """Start cold: drop all resident pages, set the counters to zero, and reset the policies."""
        self._lock.alone(lambda: self._open().reset())

    def check(self) -> None:
        """Check the model's state.

        Raises:
            InvariantError: The books are not consistent.
            UnsupportedError: Experts' weights were edited through an array or a tensor that was
                made before paging.
        """
        self._lock.alone(self._check)

    def _check(self) -> None:
        self._open().check()
        for weight in self._shared:
            weight.check()

    def close(self) -> None:
        """Release the memory and restore the model exactly. Idempotent.

        A model from ``fluxmoe.load`` cannot be restored: it has no experts afterwards, and using it
        is an error. Does nothing in a forked process, because the memory belongs to the parent.
        """
        if self._lock.here:
            with uninterrupted():
                self._lock.alone(self._close)

    def _close(self) -> None:
        if self.closed:
            return
        self._lock.leave(self.model)
        self._refusals.remove()
        self.model.set_experts_implementation(self._previous)
        # An interrupted call can be repeated until the last layer has released the lease.
        for layer in self._layers:
            experts.release(layer, gone=self._loaded)
        self._release()

    def __enter__(self) -> PagedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Runtime:
        self._runtime.pager.owner.require()
        if self.closed:
            raise ConfigError(
                "the model is no longer paged: its handle was closed",
                fix="page or load the model again",
            )
        return self._runtime

    def _arenas(self, layer: int) -> twin.Arenas:
        table = self._runtime.pager.table
        # Only the slots in use, because the cost of grouped_mm grows with the number of slots.
        slots = table.slots[table.bank(layer)]
        weights = layout.weights_of(self._layers[layer])
        arenas = self._runtime.arenas(layer)
        return {
            part: as_weight(rows[:slots], weight)
            for (part, weight), rows in zip(weights.items(), arenas, strict=True)
        }


def _release(handle: int, runtime: Runtime) -> None:
    op.detach(handle)
    runtime.close()
