"""Integrations of the pager with inference engines: ``torch`` and ``vllm``."""
