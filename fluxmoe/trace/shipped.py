"""Traces shipped with FluxMoE, recorded with the demo's model (assets/README.md)."""

from __future__ import annotations

from pathlib import Path

from fluxmoe.errors import ConfigError, join, meant

FOLDER = Path(__file__).parent / "assets"

#: Names of the traces: sampled decode at batch sizes 1, 8 and 64, and prefill of prompts of various
#: lengths.
NAMES = ("decode-1", "decode-8", "decode-64", "prefill")


def path(name: str) -> Path:
    """Return the file of a shipped trace; raise ConfigError if the name is unknown."""
    if name not in NAMES:
        raise ConfigError(
            f"unknown trace {name!r}",
            fix=join(meant(name, NAMES), f"valid names: {', '.join(NAMES)}"),
        )
    return FOLDER / f"{name}.parquet"
