"""The PyTorch backend, which pages the experts of Hugging Face models (``page`` and ``load``).

This package imports the modules of ``backends`` and the packages below, but not ``backends.vllm``.
"""
