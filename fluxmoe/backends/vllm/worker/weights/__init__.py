"""The weights of a running model, which can be changed only through ``WeightDoor``."""
