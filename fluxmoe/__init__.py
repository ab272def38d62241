"""FluxMoE: a policy-pluggable memory manager for Mixture-of-Experts inference."""

from typing import TYPE_CHECKING, Any

from fluxmoe.core.policy.arbitration import (
    ArbitrationPolicy,
    ArbitrationView,
    ExpertDemand,
    PrefixDemand,
    Split,
    StepSample,
)
from fluxmoe.core.policy.paging import EvictionPolicy, PageView, PrefetchPolicy
from fluxmoe.core.types import Access, Budget, Counters, Phase
from fluxmoe.errors import CodecError, FluxMoEError, MissingDependencyError
from fluxmoe.hookspecs import PLUGIN_API, hookimpl, hookspec
from fluxmoe.stores.codec.base import Codec
from fluxmoe.version import __version__ as __version__

if TYPE_CHECKING:
    from fluxmoe.backends.torch.loader import load
    from fluxmoe.backends.torch.paging import page

__all__ = [
    "PLUGIN_API",
    "Access",
    "ArbitrationPolicy",
    "ArbitrationView",
    "Budget",
    "Codec",
    "CodecError",
    "Counters",
    "EvictionPolicy",
    "ExpertDemand",
    "FluxMoEError",
    "PageView",
    "Phase",
    "PrefetchPolicy",
    "PrefixDemand",
    "Split",
    "StepSample",
    "hookimpl",
    "hookspec",
    "load",
    "page",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, because policies and the simulator do not need torch.
    if name == "load":
        from fluxmoe.backends.torch.loader import load

        return load
    if name != "page":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from fluxmoe.backends.torch.paging import page
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise MissingDependencyError(
            f"{error.name} is needed to page a PyTorch model", fix="pip install 'fluxmoe[hf]'"
        ) from error
    return page
