"""The PyTorch backend: pages the experts of Hugging Face models (``fluxmoe.page``, ``load``).

Imports the modules of ``backends`` and the packages below; not ``backends.vllm``.
"""
