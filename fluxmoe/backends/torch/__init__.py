"""The PyTorch backend: pages the experts of Hugging Face models (``fluxmoe.page``, ``load``)."""
