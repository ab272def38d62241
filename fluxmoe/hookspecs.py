"""The hooks of a plugin, which run once at startup and do nothing but register factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:  # importing it just for annotations would double the time of `import fluxmoe`
    from pydantic import BaseModel

#: Version of these hooks, of the contracts and of the data that plugins may read. It is incremented
#: when a change breaks conforming plugins; docs/plugins/compatibility.md describes the procedure.
PLUGIN_API = 1
#: Oldest version that still works; plugins for any version but the current load with a warning.
OLDEST_PLUGIN_API = 1

hookspec = pluggy.HookspecMarker("fluxmoe")
hookimpl = pluggy.HookimplMarker("fluxmoe")


class Register(Protocol):
    """The function passed to the hooks."""

    def __call__(
        self,
        name: str,
        factory: Callable[..., Any],
        config_model: type[BaseModel] | None = None,
    ) -> None:
        """Register ``factory``, which makes a policy or a ``fluxmoe.Codec``, under ``name``.

        The kind of a policy (eviction, prefetch, arbitration) follows from its base class.
        Options from the configuration are validated by ``config_model`` and passed as keyword
        arguments.
        """


@hookspec
def fluxmoe_register_policies(register: Register) -> None:
    """Register policies by calling ``register(name, factory, config_model=None)``."""


@hookspec
def fluxmoe_register_codecs(register: Register) -> None:
    """Register lossless codecs by calling ``register(name, factory, config_model=None)``."""
