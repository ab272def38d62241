"""Code for vLLM's engine process, beside its scheduler: arbitration, KV blocks, requests seen."""
