"""Names that every vLLM process imports, and that must therefore be cheap to import."""

from __future__ import annotations

from fluxmoe.backends.vllm.names import NAMES

NAMES.require("plugin")  # the imports below would raise an error without a remedy

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.model_executor.layers.logits_processor import LogitsProcessor

__all__ = ["KVConnectorFactory", "LogitsProcessor", "VllmConfig", "get_current_vllm_config"]
