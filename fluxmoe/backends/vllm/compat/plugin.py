"""Names imported in every vLLM process; kept light."""

from __future__ import annotations

from fluxmoe.backends.vllm.names import NAMES

NAMES.require("plugin")  # an ImportError from the lines below would give no remedy

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.model_executor.layers.logits_processor import LogitsProcessor

__all__ = ["KVConnectorFactory", "LogitsProcessor", "VllmConfig", "get_current_vllm_config"]
