"""Names imported in every process of vLLM; kept light."""

from __future__ import annotations

from fluxmoe.backends.vllm.names import NAMES

NAMES.require("plugin")  # an ImportError of the lines below would not say what to do

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.model_executor.layers.logits_processor import LogitsProcessor

__all__ = ["KVConnectorFactory", "LogitsProcessor", "VllmConfig", "get_current_vllm_config"]
