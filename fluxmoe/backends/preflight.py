"""Checks of the policies, the model's files, the stores and the machine before an engine starts.

The checks take seconds, import no engine, and add all problems to ``Findings``. ``vllm/preflight``
and ``torch/loader.py`` add the checks that only their engine needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fluxmoe import checkpoint, dimensions, machine, plugins
from fluxmoe.backends.stores import make_coders, require_room
from fluxmoe.config import Config, FileStoreConfig, Resolved
from fluxmoe.core.memory.host import HUGE_PAGE, frame_bytes_for
from fluxmoe.core.policy.arbitration import ArbitrationPolicy
from fluxmoe.core.policy.paging import Policies
from fluxmoe.errors import CheckpointError, QuantisedError, UnsupportedError
from fluxmoe.findings import Findings
from fluxmoe.plugins import Registry
from fluxmoe.stores.coding import Coder


class Chosen(NamedTuple):
    """The policies and codecs of a configuration, and the registry that created them."""

    registry: Registry
    policies: Policies
    arbitration: ArbitrationPolicy
    coders: list[Coder]


def choose(config: Config, found: Findings) -> Chosen | None:
    """Load the plugins and create the policies and codecs, as the engine will.

    Returns:
        None if an error is found, or if an earlier error made the list of plugins unreliable.
    """
    registry = found.result(plugins.load, config.plugins) if found.reliable("plugins") else None
    if registry is None:
        return None
    before = len(found.errors)
    with found.check():
        registry.check(config)
    if len(found.errors) > before:
        return None
    policies = found.result(registry.policies, config)
    arbitration = found.result(registry.arbitration, config)
    coders = found.result(make_coders, config, registry)
    if policies is None or arbitration is None or coders is None:
        return None
    return Chosen(registry, policies, arbitration, coders)


def folder_of(
    model: str,
    environment: Mapping[str, str],
    found: Findings,
    *,
    revision: str | None = None,
    cache: str | None = None,
) -> Path | None:
    """Check a model's files, and return the folder that contains them.

    Args:
        model: A folder or a hub name.
        environment: The engine's environment variables.
        revision, cache: As for ``checkpoint.downloaded``.

    Returns:
        The folder; None if the engine will download the files, or if they are missing or damaged.
    """
    with found.check():
        name = checkpoint.downloaded(model, revision, cache)
        checkpoint.require_readable(name)
        if not name.isprintable():
            _require_utf8(name)
        if os.path.isdir(name):
            return Path(name)
        if environment.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise CheckpointError(
                "this is neither a folder nor a downloaded model, and HF_HUB_OFFLINE is set",
                where=f"model: {model}",
                fix="name the folder of a checkpoint, download the model, or unset HF_HUB_OFFLINE",
            )
        found.notes.append(f"{model} is not a local folder: it will be looked up on the Hub")
    return None


def _require_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            "the engines cannot open a path that is not UTF-8", where=name, fix="rename the path"
        ) from error


def sizes_of(folder: Path, found: Findings) -> dimensions.Model | None:
    """Read the sizes of a model; None if they cannot be determined from its files."""
    with found.check():
        try:
            return dimensions.of_checkpoint(folder) if checkpoint.weight_files(folder) else None
        except QuantisedError:
            raise
        except UnsupportedError as error:  # sizes unknown; the engine may support the model
            found.notes.append(f"the memory needed by this model is not checked: {error}")
    return None


def check_stores(config: Config, nbytes: int, found: Findings) -> None:
    """Check whether the stores' folders and disks can hold ``nbytes`` bytes of pages."""
    if not found.reliable("stores"):
        return
    with found.check():
        require_room(config, nbytes)
    for store in config.stores:
        if isinstance(store, FileStoreConfig) and machine.in_memory(store.folder):
            found.notes.append(f"{store.folder} is in memory (tmpfs), so its page file uses memory")


def check_machine(config: Config, workers: int, found: Findings) -> None:
    """Add a note for each property of this machine that slows engines down."""
    if workers > machine.cores():
        found.notes.append(f"{workers} workers share {machine.cores()} cores")
    if not isinstance(config, Resolved) or machine.huge_pages():
        return
    memory = config.memory
    if int(memory.frame or frame_bytes_for(memory.budget)) >= HUGE_PAGE:
        found.notes.append(f"shared memory has no huge pages: {machine.HUGE_PAGES}")
