"""Built-in policies, registered through the same hook as the policies of plugins.

The package imports only the contracts in ``core.policy``, ``core.types`` and ``hookspecs``.
"""

from __future__ import annotations

from fluxmoe.hookspecs import Register, hookimpl
from fluxmoe.policies.arbitration.fixed import Fixed
from fluxmoe.policies.arbitration.kv_first import KvFirst, KvFirstOptions
from fluxmoe.policies.arbitration.marginal import Marginal, MarginalOptions
from fluxmoe.policies.arbitration.rho import Rho, RhoOptions
from fluxmoe.policies.eviction.belady import Belady
from fluxmoe.policies.eviction.immediate import Immediate
from fluxmoe.policies.eviction.lfru import LeastFrequentlyRecentlyUsed, LfruOptions
from fluxmoe.policies.eviction.lfu import LeastFrequentlyUsed
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.policies.eviction.next_use import NextUse
from fluxmoe.policies.eviction.s3_fifo import S3Fifo, S3FifoOptions
from fluxmoe.policies.prefetch.gate import Gate, GateOptions
from fluxmoe.policies.prefetch.markov import Markov, MarkovOptions
from fluxmoe.policies.prefetch.next_layer import NextLayer, NextLayerOptions
from fluxmoe.policies.prefetch.none import NoPrefetch


@hookimpl
def fluxmoe_register_policies(register: Register) -> None:
    """Register all built-in policies."""
    register("immediate", Immediate)
    register("lru", LeastRecentlyUsed)
    register("lfu", LeastFrequentlyUsed)
    register("lfru", LeastFrequentlyRecentlyUsed, LfruOptions)
    register("next-use", NextUse)
    register("s3-fifo", S3Fifo, S3FifoOptions)
    register("belady", Belady)
    register("none", NoPrefetch)
    register("next-layer", NextLayer, NextLayerOptions)
    register("markov", Markov, MarkovOptions)
    register("gate", Gate, GateOptions)
    register("fixed", Fixed)
    register("kv-first", KvFirst, KvFirstOptions)
    register("rho", Rho, RhoOptions)
    register("marginal", Marginal, MarginalOptions)
