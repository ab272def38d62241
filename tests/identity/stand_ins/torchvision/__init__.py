"""Stand-in for torchvision, whose names can be imported but not used.

vLLM's module for Qwen3.5 has the text model and the vision tower, and imports torchvision for the
latter. PyPI has no build of torchvision for the lock's CPU torch.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

__version__ = "0.28.0"


class _Names(MetaPathFinder, Loader):
    """An importer that creates any module below this package, with any name in it."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def exec_module(self, module):
        module.__getattr__ = lambda name: MagicMock(name=f"{module.__name__}.{name}")


sys.meta_path.insert(0, _Names())
