"""The configuration: one YAML document, validated as a whole, sizes written as ``24GiB``.

Imports the contracts of policies in the core, and modules below it; no engine.
"""

from fluxmoe.config.reading import (
    json_schema,
    load,
    load_most,
    parse,
    parse_limits,
    parse_most,
    size,
)
from fluxmoe.config.schema import (
    Config,
    FileStoreConfig,
    HandLimits,
    Memory,
    Resolved,
    ResolvedMemory,
    Share,
    is_plugin_file,
)

__all__ = [
    "Config",
    "FileStoreConfig",
    "HandLimits",
    "Memory",
    "Resolved",
    "ResolvedMemory",
    "Share",
    "is_plugin_file",
    "json_schema",
    "load",
    "load_most",
    "parse",
    "parse_limits",
    "parse_most",
    "size",
]
