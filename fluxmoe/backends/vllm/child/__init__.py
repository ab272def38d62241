"""vLLM in a child process, for commands that need an engine for a while."""
