"""Planning: predicted performance of a model for a memory budget, before loading anything."""
