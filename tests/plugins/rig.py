"""Plugins written to disk, as files and as installed distributions."""

from __future__ import annotations

import textwrap
from pathlib import Path

MRU = """
import fluxmoe

class MostRecentlyUsed(fluxmoe.EvictionPolicy):
    '''Evict the page that was used last.

    More about it.
    '''
    def score(self, view, pages):
        return -view.last_use[pages]

@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("NAME", MostRecentlyUsed)
"""


def write(path: Path, text: str = MRU, name: str = "mru") -> str:
    path.write_text(textwrap.dedent(text).replace("NAME", name))
    return str(path)


def install(site: Path, dist: str, entries: dict[str, str]) -> None:
    """Write the metadata of an installed distribution with entry points."""
    info = site / f"{dist.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
    lines = "".join(f"{entry} = {module}\n" for entry, module in entries.items())
    (info / "entry_points.txt").write_text(f"[fluxmoe]\n{lines}")
