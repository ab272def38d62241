"""Backends put the pager under an inference engine."""
