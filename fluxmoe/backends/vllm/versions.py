"""Which vLLM FluxMoE was tested with. Imports no vLLM, so that it can be asked without one."""

from __future__ import annotations

#: First supported and first unsupported version.
SUPPORTED = ((0, 32), (0, 33))
#: The same as pip writes it.
REQUIREMENT = ",".join(
    f"{sign}{'.'.join(map(str, version))}"
    for sign, version in zip((">=", "<"), SUPPORTED, strict=True)
)


def is_supported(version: str) -> bool:
    """Whether FluxMoE was tested with this version of vLLM."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    first, beyond = SUPPORTED
    return first <= numbers < beyond
