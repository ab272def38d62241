"""The contract of stores: write the parts of pages into rows provided by the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from fluxmoe.core.types import Bytes, Int64s
from fluxmoe.errors import StoreError
from fluxmoe.words import line

#: Copies page ``pages[i]`` into row ``slots[i]``, for all ``i``; from several threads at a time.
Reader = Callable[[Int64s, Int64s], None]


class Store(Protocol):
    """Read-only source of expert pages. ``read_into`` is called concurrently by several threads."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory or disk occupied by the store."""

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        """Copy a page into ``parts``, one uint8 row per part of the page class, in order.

        Raises:
            StoreError: The page could not be read; the rows' contents are undefined.
        """

    def close(self) -> None:
        """Release the store's resources. Idempotent."""


@runtime_checkable
class BatchStore(Store, Protocol):
    """A store that reads many pages in one call."""

    def reader(self, arenas: Sequence[Bytes]) -> Reader:
        """Make a reader into ``arenas``, one uint8 ``[slots, part bytes]`` per part, in order.

        It raises StoreError if a page could not be read; which of the others were copied is
        undefined. The arenas' memory must stay where it is for as long as the reader is used.
        """


@runtime_checkable
class AddressedStore(Store, Protocol):
    """A store whose pages are in page-locked memory, where a device can fetch them directly."""

    def addresses(self, page: int) -> Sequence[int]:
        """Start addresses of a page's parts, in order, valid until the store is closed.

        Raises:
            StoreError: The page is not in the store.
        """


def read(store: Store, page: int, parts: Sequence[Bytes]) -> None:
    """Call ``store.read_into``; turn any exception into a StoreError."""
    try:
        store.read_into(page, parts)
    except StoreError:
        raise
    except Exception as error:
        raise _unreadable(f"page {page}", error) from error


def reader(store: Store, arenas: Sequence[Bytes]) -> Reader:
    """Make a reader of a store's pages; any exception while it reads becomes a StoreError."""
    if isinstance(store, BatchStore):
        return partial(_together, store.reader(arenas))
    return partial(_one_by_one, store, arenas)


def _together(read_all: Reader, pages: Int64s, slots: Int64s) -> None:
    try:
        read_all(pages, slots)
    except StoreError:
        raise
    except Exception as error:
        raise _unreadable(f"one of the pages {pages.tolist()}", error) from error


def _one_by_one(store: Store, arenas: Sequence[Bytes], pages: Int64s, slots: Int64s) -> None:
    for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
        read(store, page, [rows[slot] for rows in arenas])


def locate(store: AddressedStore, page: int) -> Sequence[int]:
    """Call ``store.addresses``; turn any exception into a StoreError."""
    try:
        return store.addresses(page)
    except StoreError:
        raise
    except Exception as error:
        raise _unreadable(f"page {page}", error) from error


def _unreadable(what: str, error: Exception) -> StoreError:
    return StoreError(f"{what} cannot be read: {line(error, repr)}")
