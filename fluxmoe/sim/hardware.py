"""Hardware profiles: costs of copies and layers, for the simulator's virtual clock.

A profile is a YAML file. FluxMoE includes several profiles, based on data sheets; ``fluxmoe doctor
--measure`` writes a profile of the current machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fluxmoe.arguments import reason
from fluxmoe.config import reading
from fluxmoe.errors import ConfigError, join, meant

FOLDER = Path(__file__).parent / "profiles"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Profile(BaseModel):
    """Performance of a machine. 1 GB = 10⁹ bytes, 1 TFLOPS = 10¹² floating-point operations/s."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    name: str
    description: str = ""
    store: Literal["memory", "disk"] = "memory"
    """Location of the page store's pages."""
    load_gbps: Positive
    """Bandwidth from the page store into a slot, in GB/s."""
    load_us: NotNegative = 0
    """Fixed cost of each layer's demand copy, and of each prefetched page, in microseconds."""
    memory_gbps: Positive
    """Bandwidth at which a layer's kernel reads its experts, in GB/s."""
    tflops: Positive
    """Compute rate in the weights' format, in TFLOPS; a token takes two operations per weight."""
    weight_bytes: Positive = 2
    """Bytes of one weight in a page."""
    roofline: bool = True
    """True if reading and computing overlap, so that the longer time counts instead of the sum."""
    step_us: NotNegative = 0
    """Fixed cost of a forward pass, in microseconds."""
    layer_us: NotNegative = 0
    """Cost of a layer without its experts (attention, router, launches), in microseconds."""
    token_us: NotNegative = 0
    """Cost of each token in a layer, without its experts, in microseconds."""


def names() -> list[str]:
    """List the names of the profiles that FluxMoE includes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str | Path) -> Profile:
    """Load a profile by name or from a file.

    Raises:
        ConfigError: The name is unknown or the file is not a valid profile.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
    if not os.path.isfile(path):
        raise ConfigError(
            f"unknown hardware profile {str(name)!r}",
            where="--hardware",
            fix=join(meant(name, names()), f"use a YAML file or one of {', '.join(names())}"),
        )
    data = reading.read(path)
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        raise ConfigError(f"{field}: {reason(first)}", where=str(path)) from error


def save(profile: Profile, path: Path) -> None:
    """Write a profile.

    Raises:
        ConfigError: The file cannot be written.
    """
    text = yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write the file: {error.strerror}", where=str(path)) from error
