"""The hardware profile for a command, given by name or file, or measured on this machine.

This machine is measured once. The profile is kept in the user's cache folder, in a file named after
the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from fluxmoe import caches, machine
from fluxmoe.cli.shared import models, output
from fluxmoe.cli.shared.options import stores
from fluxmoe.errors import ConfigError

if TYPE_CHECKING:
    from fluxmoe.sim.hardware import Profile

#: Value of ``--hardware`` for this machine.
HERE = "this-machine"
#: Profile for machines that cannot be measured.
SUBSTITUTE = "laptop-nvme"


def profile_of(name: str) -> Profile:
    """Return the profile for ``--hardware``; measure this machine if its profile is missing.

    Raises:
        ConfigError: The name is unknown, or the file is not a valid profile.
    """
    from fluxmoe.sim import hardware

    if name != HERE:
        return hardware.load(name)
    if (kept := measured()) is not None:
        return kept
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")):
        output.warn(
            "torch and transformers, which are needed to measure this machine, are not installed: "
            f"the profile {SUBSTITUTE} is used; pip install 'fluxmoe[hf]', or give --hardware"
        )
        return hardware.load(SUBSTITUTE)
    output.warn("measuring this machine, once: about 20 s; --hardware selects another profile")
    found = _measure()
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        hardware.save(found, path)
    except (OSError, ConfigError) as error:
        output.warn(f"the measurement cannot be kept: {error}")
    return found


def with_store(profile: Profile, store: str, page_bytes: int) -> Profile:
    """Adapt a profile to pages of ``page_bytes`` bytes in the store that ``--store`` selects.

    Args:
        store: ``host`` for no change; ``file`` or a folder to measure the disk of the page file.

    Raises:
        ConfigError: The disk cannot be measured.
    """
    from fluxmoe.config import FileStoreConfig
    from fluxmoe.stores.disk import speed

    if store == "host":
        return profile
    folder = FileStoreConfig.model_validate(stores(store)[0]).folder
    if machine.in_memory(folder):
        output.warn(f"{folder} is in memory (tmpfs), so its page file uses memory")
    found = speed.measure(folder, page_bytes)
    said = f"pages from {folder} at {found.nbytes_per_s / 1e9:.2f} GB/s, {found.depth} at once"
    return profile.model_copy(
        update={
            "description": f"{profile.description}; {said}",
            "store": "disk",
            "load_gbps": found.nbytes_per_s / 1e9,
            "load_us": found.seconds * 1e6,
        }
    )


def measured() -> Profile | None:
    """Return this machine's profile; None if there is no file or the file is damaged."""
    from fluxmoe.sim import hardware

    try:
        return hardware.load(_path())
    except ConfigError:
        return None


def _measure() -> Profile:
    from fluxmoe.backends.torch.measure import measure
    from fluxmoe.demo.model import SHIPPED
    from fluxmoe.sim.hardware import Profile

    models.quiet()
    fields = measure(SHIPPED)
    said = f"{machine.processor()}, {fields['description']}, {date.today().isoformat()}"
    return Profile(**{**fields, "name": HERE, "description": said})


def _path() -> Path:
    """Return the file of this machine's profile.

    Raises:
        ConfigError: The user has no home folder.
    """
    # Machines that share a home folder may have different processors.
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine.processor()} {os.cpu_count()}".lower()).strip("-")
    return caches.own("hardware") / f"{name}.yaml"
