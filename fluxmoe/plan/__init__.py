"""Planning: the value of a memory budget for a model on a machine, before loading anything."""
