"""Nobody pages by half: a model built with only some of FluxMoE's settings is refused.

vLLM shows its configuration to no plugin. It does to layers, and has a door for replacing them;
nearly every model has one LogitsProcessor. This one computes what stock's does.
"""

from __future__ import annotations

from typing import Any

from fluxmoe.backends.vllm import settings
from fluxmoe.backends.vllm.compat.plugin import LogitsProcessor, get_current_vllm_config


class GuardedLogitsProcessor(LogitsProcessor):
    """vLLM's logits processor, which looks at the configuration when it is built.

    Raises:
        ConfigError: See ``settings.paging_config``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings.paging_config(get_current_vllm_config())
        super().__init__(*args, **kwargs)


def register() -> None:
    """Have vLLM build GuardedLogitsProcessor wherever a model has a logits processor."""
    LogitsProcessor.register_oot(GuardedLogitsProcessor, name="LogitsProcessor")
