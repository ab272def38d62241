"""Planning: predicted performance of a model for a memory budget, before loading anything.

Imports ``sim``, ``backends`` and the packages below them.
"""
