"""A plugin that logs its executions and its policies and codecs to the file ``$COUNTED``."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import fluxmoe

PLUGIN = __file__
#: A configuration that uses everything that the plugin registers.
SETTINGS = {
    "eviction": "counted",
    "prefetch": "counted",
    "arbitration": "counted",
    "stores": [{"kind": "host", "codec": "counted"}],
    "plugins": [PLUGIN],
}
ALL = Counter(("execute", "eviction", "prefetch", "arbitration", "codec"))
#: Settings without arbitration.
PAGING = Counter(("execute", "eviction", "prefetch", "codec"))


def counts(path: Path) -> dict[int, Counter[str]]:
    """Count the log entries of each process."""
    found: dict[int, Counter[str]] = {}
    for line in path.read_text().splitlines():
        pid, what = line.split()
        found.setdefault(int(pid), Counter())[what] += 1
    return found


def _note(what: str) -> None:
    if "COUNTED" in os.environ:
        with open(os.environ["COUNTED"], "a") as file:
            file.write(f"{os.getpid()} {what}\n")


class Eviction(fluxmoe.EvictionPolicy):
    """Evict the least recently used page."""

    def __init__(self):
        _note("eviction")

    def score(self, view, pages):
        return view.last_use[pages]


class Prefetch(fluxmoe.PrefetchPolicy):
    """Prefetch nothing."""

    def __init__(self):
        _note("prefetch")

    def propose(self, view, access):
        return access.pages[:0]


class Arbitration(fluxmoe.ArbitrationPolicy):
    """Keep the split, which may change."""

    def __init__(self):
        _note("arbitration")

    def split(self, view):
        return fluxmoe.Split(view.frames)


class Codec(fluxmoe.Codec):
    """Keep pages unchanged."""

    def __init__(self):
        _note("codec")

    def encode(self, raw):
        return raw

    def decode(self, coded, out):
        out[:] = coded


@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    for policy in Eviction, Prefetch, Arbitration:
        register("counted", policy)


@fluxmoe.hookimpl
def fluxmoe_register_codecs(register):
    register("counted", Codec)


if __name__ != "tests.plugins.counted":  # not if tests import it
    _note("execute")
