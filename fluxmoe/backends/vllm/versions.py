"""The vLLM versions that FluxMoE was tested with. This module does not import vLLM."""

from __future__ import annotations

from fluxmoe.backends.versions import numbers

#: First supported and first unsupported version.
SUPPORTED = ((0, 32), (0, 33))
#: The same range in pip's notation.
REQUIREMENT = ",".join(
    f"{sign}{'.'.join(map(str, version))}"
    for sign, version in zip((">=", "<"), SUPPORTED, strict=True)
)


def is_supported(version: str) -> bool:
    """Return True if FluxMoE was tested with this version of vLLM."""
    first, beyond = SUPPORTED
    return first <= numbers(version) < beyond
