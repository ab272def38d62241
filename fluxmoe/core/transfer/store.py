"""The contract of stores: write the parts of a page into rows provided by the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, runtime_checkable

from fluxmoe.core.types import Bytes
from fluxmoe.errors import StoreError
from fluxmoe.words import line

#: Takes a page's new contents, one uint8 row per part, which may change afterwards.
Put: TypeAlias = Callable[[int, Sequence[Bytes]], None]


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


class ChangingStore(Store, Protocol):
    """A store whose pages can be replaced."""

    def update(self) -> AbstractContextManager[Put]:
        """Replace the pages put within the ``with`` block at its end, or none if it raises.

        Until its end, ``read_into`` returns the old pages. No page may be read during its end.

        Raises:
            StoreError: A page cannot be kept, or was put twice; nothing has changed.
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
        raise _unreadable(page, error) from error


def locate(store: AddressedStore, page: int) -> Sequence[int]:
    """Call ``store.addresses``; turn any exception into a StoreError."""
    try:
        return store.addresses(page)
    except StoreError:
        raise
    except Exception as error:
        raise _unreadable(page, error) from error


def _unreadable(page: int, error: Exception) -> StoreError:
    return StoreError(f"page {page} cannot be read: {line(error, repr)}")
