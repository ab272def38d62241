"""FluxMoE's KV connector: the channel between vLLM's scheduler, its workers and ``/metrics``.

This connector transfers no KV cache. vLLM calls a connector on both sides in every step, and sends
the connector's data to the other side and, as statistics, to the process that serves ``/metrics``.
No other extension point of vLLM does that, and this one disables no features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxmoe.backends.vllm import metrics
from fluxmoe.backends.vllm.board import Address, Board
from fluxmoe.backends.vllm.compat.connector import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.metrics import Meter
from fluxmoe.backends.vllm.orphan import end_with_parent
from fluxmoe.backends.vllm.scheduler.requests import RequestWatch
from fluxmoe.backends.vllm.server.prometheus import PagingProm
from fluxmoe.backends.vllm.settings import paging_config
from fluxmoe.backends.vllm.sources import split_reader
from fluxmoe.backends.vllm.stats import PagingStats
from fluxmoe.errors import InvariantError

if TYPE_CHECKING:  # these modules import numba, which not every process needs
    from fluxmoe.backends.vllm.scheduler.arbitration import Arbitration
    from fluxmoe.backends.vllm.worker.side import WorkerSide
    from fluxmoe.core.arbitration.messages import Inventory, Order, StepReport


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Message from the scheduler to the workers, one per step."""

    order: Order | None = None


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """Message from the workers to the scheduler, one per step."""

    reports: list[StepReport]

    def aggregate(self, other: WorkerMetadata) -> WorkerMetadata:
        return WorkerMetadata([*self.reports, *other.reports])


@dataclass
class WorkerIntroduction(KVConnectorHandshakeMetadata):
    """Message from a worker to the scheduler at startup.

    Attributes:
        board: Address of the numbers that the worker and the scheduler share.
        inventory: The memory that the worker can move; None if the split is fixed.
    """

    board: Address
    inventory: Inventory | None


class PagingConnector(KVConnectorBase_V1, SupportsHMA):
    """FluxMoE's connector: one in the scheduler (role SCHEDULER), and one in each worker (WORKER).

    Raises:
        ConfigError: Other settings that paging needs are missing.
    """

    #: Requests do not wait for KV transfers.
    requires_kv_delivery = False

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: object
    ) -> None:
        paging_config(vllm_config)  # rejects a partial configuration
        super().__init__(vllm_config, role, kv_cache_config)
        end_with_parent()
        self._config = vllm_config
        self._requests = RequestWatch()
        self._boards: list[Board] = []
        self._updates = 0
        self._manager: Any = None
        #: The scheduler's side of arbitration; None if the split is fixed.
        self.arbitration: Arbitration | None = None
        self._meter = Meter(split_reader(None))
        self._worker: WorkerSide | None = None
        self._begun = False

    # --- scheduler -------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: object) -> None:
        self._manager = kv_cache_manager

    def set_xfer_handshake_metadata(self, metadata: dict[int, WorkerIntroduction]) -> None:
        """Receive the introductions of all workers; start arbitration unless the split is fixed."""
        workers = [metadata[rank] for rank in sorted(metadata)]
        self._boards = [Board(worker.board) for worker in workers]
        inventories = [worker.inventory for worker in workers if worker.inventory is not None]
        if not inventories:
            return
        from fluxmoe.backends.vllm import handover
        from fluxmoe.backends.vllm.scheduler.arbitration import Arbitration

        scheduler = self._config.scheduler_config
        self.arbitration = Arbitration(
            *handover.take(self._config),
            inventories,
            self._manager,
            watermark=scheduler.watermark,
            max_running=scheduler.max_num_seqs,
            block_tokens=self._config.cache_config.block_size,
            requests=self._requests,
        )
        self._meter = Meter(split_reader(self.arbitration.arbiter))

    def shutdown(self) -> None:
        for board in self._boards:
            board.close()

    def on_new_request(self, request: Any) -> None:
        self._forget_other_weights()
        self._requests.arrived(request)
        self._show_unfinished()

    def _forget_other_weights(self) -> None:
        """Reset the prefix cache if the weights have changed; the engine must be idle."""
        updates = max((board.updates for board in self._boards), default=0)
        if updates > self._updates:
            if not self._manager.reset_prefix_cache():
                raise InvariantError("the weights have changed while KV blocks were in use")
            self._updates = updates

    def _show_unfinished(self) -> None:
        for board in self._boards:
            board.unfinished = self._requests.unfinished

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        self._requests.looked_up(request.request_id, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(
        self, request: Any, blocks: object, num_external_tokens: int
    ) -> None:
        self._requests.admitted(request)

    def build_connector_meta(self, scheduler_output: object) -> StepMetadata:
        self._begun = True
        if self.arbitration is None:
            return StepMetadata()
        self._requests.scheduled(scheduler_output)
        return StepMetadata(self.arbitration.order())

    def update_connector_output(self, connector_output: Any) -> None:
        heard = connector_output.kv_connector_worker_meta
        if self.arbitration is not None and heard is not None:
            self.arbitration.reported(heard.reports)

    def request_finished_all_groups(
        self, request: Any, block_ids: object
    ) -> tuple[bool, dict[str, Any] | None]:
        self._requests.gone(request)
        self._show_unfinished()
        return False, None

    def has_pending_push_work(self) -> bool:
        """Return True if the engine must step although it is idle.

        An idle engine steps once at startup, so that metrics exist before the first request, and
        keeps stepping while a move is in progress.
        """
        if not self._begun:
            return True
        return self.arbitration is not None and self.arbitration.arbiter.busy

    # --- worker ----------------------------------------------------------------------------------

    def bind(self, worker: WorkerSide) -> None:
        """Attach the worker's side. The worker calls this method."""
        self._worker = worker

    def get_handshake_metadata(self) -> WorkerIntroduction | None:
        if self._worker is None:
            return None
        return WorkerIntroduction(self._worker.board, self._worker.inventory())

    def handle_preemptions(self, kv_connector_metadata: StepMetadata) -> None:
        """Receive the scheduler's order. vLLM calls this method in each step before any pass."""
        if self._worker is not None:
            self._worker.receive(kv_connector_metadata.order)

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        report = self._worker.report() if self._worker is not None else None
        return None if report is None else WorkerMetadata([report])

    def has_connector_metadata(self) -> bool:
        """Return False, so that attention layers do not call methods such as ``save_kv_layer``."""
        return False

    def start_load_kv(self, forward_context: object, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: object, attn_metadata: object, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    # --- statistics ------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> PagingStats | None:
        """Return changes to the metrics. vLLM calls this method on both sides after each step."""
        if self.role == KVConnectorRole.SCHEDULER:
            changes = self._meter.take()
        else:
            changes = self._worker.changes() if self._worker is not None else {}
        return PagingStats(changes) if changes else None

    @classmethod
    def build_kv_connector_stats(cls, data: metrics.Samples | None = None) -> PagingStats:
        return PagingStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Mapping[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PagingProm:
        return PagingProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)
