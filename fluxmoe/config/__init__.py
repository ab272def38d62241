"""The configuration: one YAML document, validated as a whole, with sizes such as ``24GiB``.

The package imports the policy contracts of the core, ``checkpoint`` and modules below the core, but
no engine.
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
