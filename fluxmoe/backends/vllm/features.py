"""vLLM features that FluxMoE does not support, by command-line option and configuration.

This module does not import vLLM, so that the preflight checks and the worker can share one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxmoe.errors import UnsupportedError

if TYPE_CHECKING:
    from fluxmoe.backends.vllm.compat.plugin import VllmConfig


class Feature(NamedTuple):
    """An unsupported feature.

    Attributes:
        name: Name of the feature.
        option: The feature's option of ``vllm serve``, without leading dashes.
        attribute: The feature's attribute in ``VllmConfig``.
    """

    name: str
    option: str
    attribute: str


REFUSED = (
    Feature(
        "expert parallelism", "enable-expert-parallel", "parallel_config.enable_expert_parallel"
    ),
    Feature("expert load balancing", "enable-eplb", "parallel_config.enable_eplb"),
    Feature("dual batch overlap", "enable-dbo", "parallel_config.enable_dbo"),
    Feature(
        "pipeline parallelism", "pipeline-parallel-size", "parallel_config.pipeline_parallel_size"
    ),
    Feature("data parallelism", "data-parallel-size", "parallel_config.data_parallel_size"),
    Feature("LoRA", "enable-lora", "lora_config"),
    Feature("speculative decoding", "speculative-config", "speculative_config"),
    Feature("weight transfer", "weight-transfer-config", "weight_transfer_config"),
    Feature("sleep mode", "enable-sleep-mode", "model_config.enable_sleep_mode"),
)


def refused_options(options: Mapping[str, Any]) -> Iterator[UnsupportedError]:
    """Yield an error for each unsupported feature that these options of ``vllm serve`` enable.

    Args:
        options: Names without leading dashes → values.
    """
    for feature in REFUSED:
        if _on(options.get(feature.option)):
            yield _refusal(feature, f"vllm.{feature.option}")


def refused_settings(config: VllmConfig) -> Iterator[UnsupportedError]:
    """Yield an error for each unsupported feature that an engine's configuration enables."""
    for feature in REFUSED:
        if _on(attrgetter(feature.attribute)(config)):
            yield _refusal(feature)


def _on(value: object) -> bool:
    """Return True for a set flag, a size above 1, and a value of another type except None."""
    if isinstance(value, int):
        return value is True or value > 1
    return value is not None


def _refusal(feature: Feature, where: str = "") -> UnsupportedError:
    return UnsupportedError(
        f"FluxMoE does not support {feature.name} (--{feature.option}) yet",
        where=where,
        fix="turn it off",
    )
