"""Stores: where the clean copies of expert pages lie while they are not in a slot."""

from fluxmoe.core.transfer.store import Store
from fluxmoe.stores.host import HostStore
from fluxmoe.stores.pinned import PinnedStore

__all__ = ["HostStore", "PinnedStore", "Store"]
