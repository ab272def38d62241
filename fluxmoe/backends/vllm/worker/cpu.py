"""The paged CPU worker, which pages the experts and gives the KV cache the rest of the budget."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import Any

from fluxmoe import checkpoint, plugins
from fluxmoe import config as fluxmoe_config
from fluxmoe.backends import op
from fluxmoe.backends.budget import KVNeed
from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.stores import make_coders, make_store
from fluxmoe.backends.tensors import as_weight, pages_of
from fluxmoe.backends.vllm import handover
from fluxmoe.backends.vllm.compat.cpu import CPUWorker
from fluxmoe.backends.vllm.compat.numba import tolerate_numba
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.compat.worker import (
    RoutedExperts,
    drop_connector,
    get_tensor_model_parallel_rank,
    step_phase,
    worker_connector,
)
from fluxmoe.backends.vllm.names import NAMES
from fluxmoe.backends.vllm.orphan import end_with_parent
from fluxmoe.backends.vllm.settings import paging_config
from fluxmoe.backends.vllm.worker import budget, checks, kv, selfcheck, start
from fluxmoe.backends.vllm.worker.answers import together
from fluxmoe.backends.vllm.worker.layer import PagedRoutedExperts, use_paged_layers
from fluxmoe.backends.vllm.worker.limits import in_frames as limits_in_frames
from fluxmoe.backends.vllm.worker.lookahead import predict_next
from fluxmoe.backends.vllm.worker.reach import bank_limit, require_addressable
from fluxmoe.backends.vllm.worker.recording import Requests, note_weights
from fluxmoe.backends.vllm.worker.side import WorkerSide
from fluxmoe.backends.vllm.worker.weights.calls import WEIGHT_CALLS, guard_loading, refusing
from fluxmoe.backends.vllm.worker.weights.door import WeightDoor
from fluxmoe.backends.vllm.worker.weights.loading import ExpertLoading
from fluxmoe.backends.vllm.worker.weights.streamed import PARTS
from fluxmoe.config import HandLimits
from fluxmoe.core.transfer.store import ChangingStore
from fluxmoe.core.types import Phase
from fluxmoe.errors import (
    FluxMoEError,
    InvariantError,
    UnsupportedError,
)
from fluxmoe.trace.recorder import Recorder


class PagedCPUWorker(CPUWorker):
    """vLLM's CPU worker with paged experts."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        tolerate_numba()  # this module has loaded numba
        use_paged_layers()
        end_with_parent()
        config = fluxmoe_config.parse(paging_config(vllm_config), where="additional_config.fluxmoe")
        #: True if experts are paged (not ``preset: off``).
        self._paging = config.preset != "off"
        if self._paging:
            checks.refuse_unsupported(vllm_config)
        resolved = config.resolved(config.memory.budget or budget.automatic(config, vllm_config))
        if vllm_config.load_config.load_format in checkpoint.LOAD_FORMATS:
            checkpoint.require_readable(vllm_config.model_config.model)
        # Policies are created here, so that their errors are raised before the weights are loaded.
        self._registry = registry = plugins.load(config.plugins)
        self._policies = registry.policies(config)
        arbitration = registry.arbitration(config)
        self._dynamic = self._paging and config.dynamic(arbitration)
        if self._dynamic:
            checks.refuse_moving_split(vllm_config)
            handover.leave(vllm_config, resolved, arbitration)
        self._coders = make_coders(config, registry)
        self._config = budget.with_kv_target(
            resolved, vllm_config.cache_config.kv_cache_memory_bytes
        )
        # An explicit size keeps vLLM from claiming 92% of the machine's memory. The real size is
        # set later.
        vllm_config.cache_config.kv_cache_memory_bytes = int(resolved.memory.budget)
        super().__init__(vllm_config, *args, **kwargs)
        self._runtime: Runtime | None = None
        self._recorder: Recorder | None = None
        self._limits = HandLimits()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model like stock vLLM, but with the experts in the store."""
        if not self._paging:
            super().load_model(*args, **kwargs)
            return
        make = partial(make_store, self._config, self._coders)
        loading = ExpertLoading(self.vllm_config, make)
        load = self.vllm_config.load_config
        model, revision = self.model_config.model, self.model_config.revision
        with loading.during():
            super().load_model(*args, **kwargs)
            folder = checkpoint.downloaded(model, revision, load.download_dir)
            # The files of a model given by its name on the Hub exist only now.
            if loading.load_format in checkpoint.LOAD_FORMATS and folder != model:
                checkpoint.require_readable(folder)
        loaded = self.model_runner.model
        try:
            NAMES.require_on("model_runner", self.model_runner)
            loading.collect(loaded)
            runtime = self._page_out(loading.layers, loading.store)
        except BaseException:
            loading.close()
            raise
        self._door = WeightDoor(loaded, loading.layers, runtime, self.vllm_config, folder)
        guard_loading(loaded, self._door)

    def _page_out(self, layers: list[PagedRoutedExperts], store: ChangingStore) -> Runtime:
        geometry, page_class = pages_of(layers, PARTS)
        self.kernel = selfcheck.require_sound(layers[0], PARTS)
        weights = [getattr(layers[0], name) for name in PARTS]
        self._runtime = runtime = Runtime(
            self._config,
            self._policies,
            geometry,
            page_class,
            store,
            self._kv_need(),
            dynamic=self._dynamic,
            bank_limit=bank_limit(max(part.elements for part in page_class.parts)),
            top_k=layers[0].top_k if self.kernel.waves else None,
            phase=partial(step_phase, self.model_runner),
        )
        self._handle = handle = op.attach(runtime.pager)
        # vLLM does not shut down a worker whose start fails later, but only drops its object.
        self._release = weakref.finalize(self, _release, handle, runtime)
        self._top_k = layers[0].top_k
        for index, layer in enumerate(layers):
            arenas = zip(PARTS, weights, runtime.arenas(index), strict=True)
            layer.bind(
                handle,
                index,
                {name: require_addressable(as_weight(rows, like)) for name, like, rows in arenas},
                waves=runtime.partition.in_waves,
            )
        if runtime.pager.predictions:
            predict_next(self.model_runner.model, layers, handle)
        return runtime

    def _kv_need(self) -> KVNeed:
        return kv.need(self.vllm_config, self.get_kv_cache_spec().values())

    def determine_available_memory(self) -> int:
        """Give the KV cache the rest of the budget, and reset the pager after the warm-up runs."""
        if self._runtime is None:
            modules = self.model_runner.model.modules()
            layers = [module for module in modules if isinstance(module, RoutedExperts)]
            experts = sum(int(weight.nbytes) for layer in layers for weight in layer.parameters())
            self.cache_config.kv_cache_memory_bytes = kv.beside_all_experts(
                self._config.memory, experts, self._kv_need()
            )
        else:
            self.cache_config.kv_cache_memory_bytes = self._runtime.kv_reserved_bytes
        available: int = super().determine_available_memory()
        if self._runtime is not None:
            self._runtime.reset()
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Place the KV cache in the arena, and attach the connector to this worker."""
        if self._runtime is None:
            super().initialize_from_config(kv_cache_config)
            return
        kv_cache_config = copy.deepcopy(kv_cache_config)  # shared with an in-process scheduler
        self._kv_buffer = kv.place(self._runtime, kv_cache_config)
        super().initialize_from_config(kv_cache_config)
        if not self._kv_buffer.used:
            raise InvariantError("vLLM has allocated its KV cache elsewhere")
        connector = worker_connector()
        rank = get_tensor_model_parallel_rank()
        self._side = WorkerSide(self._runtime, rank, self._door.board)
        connector.bind(self._side)
        weakref.finalize(self, drop_connector, connector)
        if rank == 0:
            specs = self.get_kv_cache_spec().values()
            start.log(self._runtime, self._registry, self.vllm_config, specs, self._top_k)

    def _maybe_get_memory_pool_context(self, tag: str) -> Any:
        if tag == "kv_cache" and self._runtime is not None:
            return self._kv_buffer
        return super()._maybe_get_memory_pool_context(tag)

    def shutdown(self) -> None:
        """Release the model, and then the arenas."""
        super().shutdown()
        try:
            self._end_recording()
        finally:
            if self._runtime is not None:
                self._runtime = None
                self._release()
                self._door.board.close()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, except in a forked process, which shares the parent's KV cache."""
        if self._runtime is not None:
            self._runtime.pager.owner.require()
        return super().execute_model(*args, **kwargs)

    @property
    def _paged(self) -> Runtime:
        """The runtime.

        Raises:
            UnsupportedError: Nothing is paged, or this is a forked process.
        """
        if self._runtime is None:
            raise UnsupportedError("paging is off", where="preset", fix="remove preset: off")
        self._runtime.pager.owner.require()
        return self._runtime

    # --- called through collective_rpc -----------------------------------------------------------

    def fluxmoe_stats(self) -> dict[str, Any]:
        """Return counters and sizes as plain numbers."""
        stats = self._paged.stats()
        own = {"orders": self._side.orders, "weight_updates": self._door.board.updates}
        return {**stats, **own}

    apply_model = together(CPUWorker.apply_model)

    @together
    def reload_weights(
        self,
        weights_iterator: Any = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Replace weights of the model between steps. See ``WeightDoor.update``.

        Args:
            weights_iterator: Names and tensors as in the checkpoint.
            weights_path: Folder of a checkpoint, used if there is no ``weights_iterator``; by
                default, the checkpoint that the engine was started with.
            is_checkpoint_format: Must be True.
        """
        if self._runtime is None:
            super().reload_weights(weights_iterator, weights_path, is_checkpoint_format)
            return
        if not is_checkpoint_format:
            refusing("is_checkpoint_format=False", "give the weights as in the checkpoint")()
        self._paged.pager.owner.require()
        self._door.reload(weights_iterator, weights_path)

    @together
    def fluxmoe_check(self) -> None:
        """Raise InvariantError unless the state of pager and memory is consistent."""
        self._paged.check()

    def fluxmoe_limit(self, limits: dict[str, Any] | None = None) -> dict[str, Any]:
        """Set the limits on the split from the next step on, and return the limits.

        Args:
            limits: ``config.HandLimits``: ``budget``, and ``experts`` and ``kv`` with ``min`` and
                ``max`` each, or None to change nothing. Omitted limits are reset to the
                configured values.

        Returns:
            The ``limits`` set, the current ``split`` and the ``budget``, in bytes; or only
            ``error``, in which case nothing has changed. (An exception would lose its code
            between vLLM's processes.)
        """
        try:
            runtime = self._paged
            if limits is not None:
                wanted = fluxmoe_config.parse_limits(limits, where="limits")
                self._side.limit(limits_in_frames(runtime, wanted))
                self._limits = wanted
            elif not runtime.config.control:
                limits_in_frames(runtime, self._limits)
        except FluxMoEError as error:
            message = "; ".join(each.text for each in error.problems())
            return {"error": {"code": error.code, "message": message}}
        frame = runtime.memory.pool.frame_bytes
        return {
            "limits": self._limits.model_dump(mode="json"),
            "split": {name: count * frame for name, count in runtime.memory.frames().items()},
            "budget": runtime.memory.budget_bytes,
        }

    @together
    def fluxmoe_record(
        self,
        path: str | None,
        weights: bool = False,
        max_steps: int | None = None,
        phase: Phase | None = None,
        replace: bool = False,
    ) -> None:
        """Start recording the routing of every step to a trace, or end the recording.

        Args:
            path: Path of the new file, which appears when the recording ends; None to end it.
            weights: Also record the routing weights (eager mode only).
            max_steps: Number of steps after which recording stops.
            phase: Record only the steps of this phase.
            replace: Overwrite an existing file.

        Raises:
            TraceError: The file cannot be written or, when the recording ends, nothing was
                recorded.
            ConfigError: The file already exists and ``replace`` is false.
        """
        self._end_recording()
        if path is not None:
            self._recorder = Recorder(
                path,
                self._paged.trace_meta(
                    model=str(self.model_config.model), top_k=self._top_k, source="vllm"
                ),
                columns=["weights"] * weights + ["predicted"] * self._paged.pager.predictions,
                replace=replace,
                max_steps=max_steps,
                phase=phase,
                rows=Requests(self.model_runner),
            )
            note_weights(self.model_runner, weights)
            op.record(self._handle, self._recorder)

    def fluxmoe_recorded(self) -> bool:
        """Return True if the recording has all its steps, or if no recording is active."""
        return self._recorder is None or self._recorder.done

    def _end_recording(self) -> None:
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            op.record(self._handle, None)
            note_weights(self.model_runner, False)
            recorder.close()

    def fluxmoe_reset(self) -> None:
        """Start cold: drop all pages, and set all counters except those on ``/metrics`` to zero."""
        self._paged.reset()
        self._side.restarted()


for _call, _fix in WEIGHT_CALLS.items():
    setattr(PagedCPUWorker, _call, together(refusing(_call, _fix)))


def _release(handle: int, runtime: Runtime) -> None:
    op.detach(handle)
    runtime.close()
