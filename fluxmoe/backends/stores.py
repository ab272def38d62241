"""Creation of the configured stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxmoe import machine, sizes
from fluxmoe.config import Config, FileStoreConfig
from fluxmoe.core.types import Geometry, PageClass
from fluxmoe.errors import ConfigError
from fluxmoe.plugins import Registry
from fluxmoe.stores.coding import Coder
from fluxmoe.stores.disk import catalogue
from fluxmoe.stores.disk.key import Key
from fluxmoe.stores.disk.tier import FileTier
from fluxmoe.stores.encoded import HostTier
from fluxmoe.stores.host import HostStore
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
    config: Config,
    coders: Sequence[Coder],
    geometry: Geometry,
    page_class: PageClass,
    key: Key,
) -> HostStore | TieredStore:
    """Make an empty store.

    Args:
        config: The configuration.
        coders: One coder per configured store, from ``make_coders``.
        geometry, page_class: Numbers of layers and experts, and the layout of a page.
        key: Function that describes the weights, for stores that keep pages between starts.
    """
    if config.stores[0].plain:
        return HostStore(geometry, page_class)  # takes all pages without a copy
    tiers: list[Tier] = []
    beside: list[dict[str, Any]] = []
    for store, coder in zip(config.stores, coders, strict=True):
        limit = None if store.limit is None else int(store.limit)
        if isinstance(store, FileStoreConfig):
            tiers.append(
                FileTier(
                    geometry,
                    page_class,
                    store.folder,
                    coder,
                    limit,
                    key=key,
                    options=store.codec,
                    beside=beside,
                    direct=store.direct,
                    depth=store.depth,
                )
            )
        else:
            tiers.append(HostTier(coder, limit))
        beside.append({"kind": store.kind, "limit": limit, "codec": store.codec})
    return TieredStore(geometry, page_class, tiers)


def require_room(config: Config, nbytes: int) -> None:
    """Reject file stores whose folder is not writable or whose disk is too small.

    The largest page file counts as free space, because it may be this model's. The size of encoded
    pages is unknown in advance, so only stores without a codec are checked for space.

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
        folder, where = store.folder, f"stores.{index}.path"
        machine.require_writable(folder, where=where, fix="name a writable folder")
        # One of the files may be this model's. An incomplete file is continued or removed.
        files = [
            file.nbytes
            for file in catalogue.entries(folder)
            if file.state == "complete" or file.useless
        ]
        free = machine.free_disk(folder) + max(files, default=0)
        if store.codec["kind"] == "none" and kept > free:
            needed, there = sizes.apart(kept, free)
            raise ConfigError(
                f"the pages need {needed}, but {folder} has room for only {there}",
                where=where,
                fix="name a folder on a larger disk, or set a limit and add another store",
            )
