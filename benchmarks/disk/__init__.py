"""Decoding a model that is larger than memory from a disk, against other engines."""
