"""The weights of a running model: one door through which they change; other ways are refused."""
