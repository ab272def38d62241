"""The configuration: one YAML document, validated as a whole, sizes written as ``24GiB``."""

from fluxmoe.config.reading import json_schema, load, parse, parse_limits, size
from fluxmoe.config.schema import (
    Config,
    FileStoreConfig,
    HandLimits,
    Memory,
    Resolved,
    ResolvedMemory,
    Share,
)

__all__ = [
    "Config",
    "FileStoreConfig",
    "HandLimits",
    "Memory",
    "Resolved",
    "ResolvedMemory",
    "Share",
    "json_schema",
    "load",
    "parse",
    "parse_limits",
    "size",
]
