"""Rejection of partial configurations, which have only some of FluxMoE's settings.

vLLM passes its configuration not to plugins but to layers, which plugins can replace. Nearly every
model has one LogitsProcessor, and the replacement computes the same as the stock class.
"""

from __future__ import annotations

from typing import Any

from fluxmoe.backends.vllm import settings
from fluxmoe.backends.vllm.compat.plugin import LogitsProcessor, get_current_vllm_config


class GuardedLogitsProcessor(LogitsProcessor):
    """vLLM's logits processor with a check of the configuration on creation.

    Raises:
        ConfigError: See ``settings.paging_config``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings.paging_config(get_current_vllm_config())
        super().__init__(*args, **kwargs)


def register() -> None:
    """Make vLLM build GuardedLogitsProcessor in place of its own logits processor."""
    LogitsProcessor.register_oot(GuardedLogitsProcessor, name="LogitsProcessor")
