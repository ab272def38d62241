"""The engine process: the split between experts and KV cache, and the scheduler's side of both."""
