"""Plugins: finding and loading them, and the registry of policies and codecs.

Imports ``policies``, ``stores``, ``config`` and the packages below them.
"""

from fluxmoe.plugins.loading import ALLOW_LIST, GROUP, load
from fluxmoe.plugins.registry import Origin, Plugin, PolicySpec, Registration, Registry, name_of

__all__ = [
    "ALLOW_LIST",
    "GROUP",
    "Origin",
    "Plugin",
    "PolicySpec",
    "Registration",
    "Registry",
    "load",
    "name_of",
]
