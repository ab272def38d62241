"""Handover of the arbitration policy from a worker to the scheduler's side in the same process.

The worker creates the policy before loading weights, to find out whether the split may change; the
scheduler's side calls the policy. If both run in one process, the only object that both get from
vLLM is the configuration, so the worker stores the policy under the configuration's identity. In
a process without a worker, nothing is stored, and the scheduler's side creates its own policy.
"""

from __future__ import annotations

import weakref

from fluxmoe import config as fluxmoe_config
from fluxmoe import plugins
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.settings import paging_config
from fluxmoe.config import Config
from fluxmoe.core.policy.arbitration import ArbitrationPolicy

#: Identity of a VllmConfig, which is unhashable → FluxMoE's configuration and the policy, until the
#: scheduler's side takes them or the VllmConfig is garbage-collected.
_left: dict[int, tuple[Config, ArbitrationPolicy]] = {}


def leave(vllm_config: VllmConfig, config: Config, policy: ArbitrationPolicy) -> None:
    """Store the policy and its configuration for the scheduler's side of the same engine."""
    _left[id(vllm_config)] = config, policy
    weakref.finalize(vllm_config, _left.pop, id(vllm_config), None).atexit = False


def take(vllm_config: VllmConfig) -> tuple[Config, ArbitrationPolicy]:
    """Take the policy that the worker has stored, or create the policy.

    Raises:
        UnknownPolicyError, ConfigError, PluginLoadError: The policy cannot be created.
    """
    left = _left.pop(id(vllm_config), None)
    if left is not None:
        return left
    config = fluxmoe_config.parse(paging_config(vllm_config), where="additional_config.fluxmoe")
    return config, plugins.load(config.plugins).arbitration(config)
