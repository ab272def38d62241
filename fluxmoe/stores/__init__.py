"""Stores: where the clean copies of expert pages lie while they are not in a slot."""

from fluxmoe.core.transfer.store import Store
from fluxmoe.cuda.pinned_store import PinnedStore
from fluxmoe.stores.host import HostStore

__all__ = ["HostStore", "PinnedStore", "Store"]
