"""Code for vLLM's engine process, next to its scheduler: arbitration, KV blocks, requests."""
