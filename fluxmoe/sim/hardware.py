"""Hardware profiles: what a copy and a layer cost, for the simulator's virtual clock.

A profile is a YAML file. Some come with FluxMoE, from data sheets; ``fluxmoe doctor --measure``
writes one for this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fluxmoe.errors import ConfigError

FOLDER = Path(__file__).parent / "profiles"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Profile(BaseModel):
    """What a machine can do. GB are 10⁹ bytes, TFLOPS 10¹² floating-point operations a second."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    name: str
    description: str = ""
    load_gbps: Positive
    """From where the pages lie into a slot."""
    load_us: NotNegative = 0
    """What a layer's demand for pages costs beside their bytes, and each prefetched page."""
    memory_gbps: Positive
    """At which a layer's kernel reads the experts it uses."""
    tflops: Positive
    """At which it computes, in the format of the weights: two operations per weight and token."""
    weight_bytes: Positive = 2
    """Bytes of one weight in a page."""
    roofline: bool = True
    """Whether reading and computing overlap, so that the longer one counts; else their sum."""
    step_us: NotNegative = 0
    """Of a forward pass, whatever is in it."""
    layer_us: NotNegative = 0
    """Of a layer beside its experts: attention, router, launches."""
    token_us: NotNegative = 0
    """Of a token in a layer, beside its experts."""


def names() -> list[str]:
    """The profiles that come with FluxMoE."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str | Path) -> Profile:
    """A profile by its name or from a file.

    Raises:
        ConfigError: There is none of this name, or the file is no profile; the field is named.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"no hardware profile {str(name)!r}",
            where="--hardware",
            fix=f"name a YAML file, or one of {', '.join(names())}",
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read it: {error}", where=str(path)) from error
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        raise ConfigError(f"{field}: {first['msg']}", where=str(path)) from error


def save(profile: Profile, path: Path) -> None:
    """Write a profile.

    Raises:
        ConfigError: The file cannot be written.
    """
    text = yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write it: {error.strerror}", where=str(path)) from error
