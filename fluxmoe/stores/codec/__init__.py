"""Lossless codes for expert pages."""
