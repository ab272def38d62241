"""``fluxmoe trace info``."""

from __future__ import annotations

from pathlib import Path


def info(trace: Path) -> None:
    """Stub."""
