"""vLLM in a child process, for commands that need an engine: the client and the engine.

Imports vLLM in the child only.
"""
