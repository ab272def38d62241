"""vLLM in a child process, for commands that need an engine: the client and the engine.

Only the child imports vLLM.
"""
