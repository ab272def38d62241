"""The weights of a running model: one door through which they change, the others refused."""
