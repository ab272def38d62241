"""Creation of the configured stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fluxmoe import machine, sizes
from fluxmoe.config import Config, FileStoreConfig
from fluxmoe.core.types import Geometry, PageClass
from fluxmoe.errors import ConfigError
from fluxmoe.plugins import Registry
from fluxmoe.stores.coding import Coder
from fluxmoe.stores.file import FileTier
from fluxmoe.stores.host import HostStore, HostTier
from fluxmoe.stores.tiers import Tier, TieredStore


def make_coders(config: Config, registry: Registry) -> list[Coder]:
    """Make one coder per configured store.

    Raises:
        UnknownCodecError, ConfigError, PluginLoadError, MissingDependencyError: A codec cannot be
            loaded.
    """
    return [
        Coder(
            registry.create("codec", store.codec),
            str(store.codec["kind"]),
            strict=config.strict_policies,
        )
        for store in config.stores
    ]


def make_store(
    config: Config, geometry: Geometry, page_class: PageClass, coders: Sequence[Coder]
) -> HostStore | TieredStore:
    """Make an empty store with the coders of ``make_coders``, to be filled layer by layer."""
    if config.stores[0].plain:
        return HostStore(geometry, page_class)  # takes all pages without a copy
    tiers: list[Tier] = []
    for store, coder in zip(config.stores, coders, strict=True):
        limit = None if store.limit is None else int(store.limit)
        if isinstance(store, FileStoreConfig):
            folder = Path(store.path).expanduser()
            tiers.append(
                FileTier(
                    geometry,
                    page_class,
                    folder,
                    coder,
                    limit,
                    options=store.codec,
                    direct=store.direct,
                )
            )
        else:
            tiers.append(HostTier(coder, limit))
    return TieredStore(geometry, page_class, tiers)


def require_room(config: Config, nbytes: int) -> None:
    """Reject file stores whose folder is not writable or whose disk is too small.

    Existing page files count as room. The size of encoded pages is unknown in advance, so only
    stores without a codec are checked for room.

    Args:
        config: The configuration.
        nbytes: Bytes of all expert pages.

    Raises:
        ConfigError: A folder is not writable, or its disk is too small.
    """
    rest = nbytes
    for index, store in enumerate(config.stores):
        kept = rest if store.limit is None else min(rest, int(store.limit))
        rest -= kept
        if not isinstance(store, FileStoreConfig):
            continue
        folder, where = Path(store.path).expanduser(), f"stores.{index}.path"
        machine.require_writable(folder, where=where, fix="name a writable folder")
        free = machine.free_disk(folder) + sum(f.stat().st_size for f in folder.glob("*.pages"))
        if store.codec["kind"] == "none" and kept > free:
            needed, there = sizes.apart(kept, free)
            raise ConfigError(
                f"the pages need {needed}, but {folder} has room for only {there}",
                where=where,
                fix="name a folder on a larger disk, or set a limit and add another store",
            )
