"""Shared by all tests: how Hypothesis runs."""

import os

from hypothesis import settings

settings.register_profile(
    "fluxmoe", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("fluxmoe")
