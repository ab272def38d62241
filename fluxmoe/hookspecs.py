"""The whole plugin surface. Hooks run once, at start-up, and only register factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:  # for the annotations alone it would double the time of `import fluxmoe`
    from pydantic import BaseModel

#: The version of this page, the contracts and what they may read. It is raised when plugins that
#: keep to it would have to be changed; docs/plugins/compatibility.md tells how that goes.
PLUGIN_API = 1
#: The oldest that still works; between the two, loading a plugin warns.
OLDEST_PLUGIN_API = 1

hookspec = pluggy.HookspecMarker("fluxmoe")
hookimpl = pluggy.HookimplMarker("fluxmoe")


class RegisterPolicy(Protocol):
    """The function that ``fluxmoe_register_policies`` is given."""

    def __call__(
        self,
        name: str,
        factory: Callable[..., Any],
        config_model: type[BaseModel] | None = None,
    ) -> None:
        """Make ``factory`` known as ``name``.

        The kind (eviction, prefetch, arbitration) follows from the base class of ``factory``.
        Options from the configuration are validated by ``config_model`` and passed as keywords.
        """


@hookspec
def fluxmoe_register_policies(register: RegisterPolicy) -> None:
    """Register policies by calling ``register(name, factory, config_model=None)``."""


class RegisterCodec(Protocol):
    """The function that ``fluxmoe_register_codecs`` is given."""

    def __call__(
        self,
        name: str,
        factory: Callable[..., Any],
        config_model: type[BaseModel] | None = None,
    ) -> None:
        """Make ``factory``, which makes a ``fluxmoe.Codec``, known as ``name``.

        Options from the configuration are validated by ``config_model`` and passed as keywords.
        """


@hookspec
def fluxmoe_register_codecs(register: RegisterCodec) -> None:
    """Register lossless codes by calling ``register(name, factory, config_model=None)``."""
