"""The vLLM versions that FluxMoE was tested with. Does not import vLLM."""

from __future__ import annotations

#: First supported and first unsupported version.
SUPPORTED = ((0, 32), (0, 33))
#: The same range in pip's notation.
REQUIREMENT = ",".join(
    f"{sign}{'.'.join(map(str, version))}"
    for sign, version in zip((">=", "<"), SUPPORTED, strict=True)
)


def is_supported(version: str) -> bool:
    """True if FluxMoE was tested with this version of vLLM."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    first, beyond = SUPPORTED
    return first <= numbers < beyond
