"""The PyTorch backend: pages the experts of Hugging Face models (``fluxmoe.page``, ``load``).

Imports the modules of ``backends`` and the packages below; not ``backends.vllm``.
"""

from __future__ import annotations

from fluxmoe.backends.torch.loader import load
from fluxmoe.backends.torch.paged import PagedModel
from fluxmoe.backends.torch.paging import page

__all__ = ["PagedModel", "load", "page"]
