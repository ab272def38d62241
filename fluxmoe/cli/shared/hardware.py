"""The hardware profile for a command: by name, from a file, or of this machine.

This machine is measured once. The profile is kept in the user's cache folder, in a file named after
the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from fluxmoe.cli.shared import models, output
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
    output.warn("measuring this machine, once: about a minute; --hardware selects another profile")
    found = _measure()
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        hardware.save(found, path)
    except (OSError, RuntimeError, ConfigError) as error:  # RuntimeError: no home folder
        output.warn(f"the measurement cannot be kept: {error}")
    return found


def measured() -> Profile | None:
    """Return this machine's profile; None if there is no file or the file is damaged."""
    from fluxmoe.sim import hardware

    try:
        return hardware.load(_path())
    except (RuntimeError, ConfigError):
        return None


def _measure() -> Profile:
    from fluxmoe.backends.torch.measure import measure
    from fluxmoe.demo.model import SHIPPED
    from fluxmoe.sim.hardware import Profile

    models.quiet()
    fields = measure(SHIPPED)
    said = f"{_cpu()}, {fields['description']}, {date.today().isoformat()}"
    return Profile(**{**fields, "name": HERE, "description": said})


def _path() -> Path:
    """Return the file of this machine's profile.

    Raises:
        RuntimeError: The user has no home folder.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    name = re.sub(r"[^a-z0-9]+", "-", f"{_cpu()} {os.cpu_count()}".lower()).strip("-")
    return Path(root) / "fluxmoe" / "hardware" / f"{name}.yaml"


def _cpu() -> str:
    """Return the CPU's name, which distinguishes machines that share a home folder."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return sys.platform
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else sys.platform
