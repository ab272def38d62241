"""The hooks of a plugin. They run once, at start-up, and only register factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:  # for the annotations alone it would double the time of `import fluxmoe`
    from pydantic import BaseModel

#: Version of these hooks, the contracts and the data they may read. It is raised when a change
#: breaks conforming plugins; docs/plugins/compatibility.md describes the procedure.
PLUGIN_API = 1
#: Oldest version that still works; a plugin for a version between the two loads with a warning.
OLDEST_PLUGIN_API = 1

hookspec = pluggy.HookspecMarker("fluxmoe")
hookimpl = pluggy.HookimplMarker("fluxmoe")


class RegisterPolicy(Protocol):
    """The function passed to ``fluxmoe_register_policies``."""

    def __call__(
        self,
        name: str,
        factory: Callable[..., Any],
        config_model: type[BaseModel] | None = None,
    ) -> None:
        """Register ``factory`` under ``name``.

        The kind (eviction, prefetch, arbitration) follows from the base class of ``factory``.
        Options from the configuration are validated by ``config_model`` and passed as keywords.
        """


@hookspec
def fluxmoe_register_policies(register: RegisterPolicy) -> None:
    """Register policies by calling ``register(name, factory, config_model=None)``."""


class RegisterCodec(Protocol):
    """The function passed to ``fluxmoe_register_codecs``."""

    def __call__(
        self,
        name: str,
        factory: Callable[..., Any],
        config_model: type[BaseModel] | None = None,
    ) -> None:
        """Register ``factory``, which makes a ``fluxmoe.Codec``, under ``name``.

        Options from the configuration are validated by ``config_model`` and passed as keywords.
        """


@hookspec
def fluxmoe_register_codecs(register: RegisterCodec) -> None:
    """Register lossless codes by calling ``register(name, factory, config_model=None)``."""
