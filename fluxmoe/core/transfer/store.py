"""What the pager asks of a store: to write a page's parts where the caller wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from fluxmoe.core.types import Bytes
from fluxmoe.core.words import line
from fluxmoe.errors import StoreError


class Store(Protocol):
    """Read-only source of expert pages. ``read_into`` is called from several threads at once."""

    @property
    def nbytes(self) -> int:
        """Memory or disk the store occupies, in bytes."""

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        """Copy a page into ``parts``: one uint8 row per part of the page class, in order.

        Raises:
            StoreError: The page could not be read; the rows' contents are undefined.
        """

    def close(self) -> None:
        """Release what the store holds. Idempotent."""


@runtime_checkable
class AddressedStore(Store, Protocol):
    """A store whose pages lie where a device can fetch them by itself, in page-locked memory."""

    def addresses(self, page: int) -> Sequence[int]:
        """Where a page's parts begin, in order. They stay there until the store is closed.

        Raises:
            StoreError: The page is not in the store.
        """


def read(store: Store, page: int, parts: Sequence[Bytes]) -> None:
    """``store.read_into``; whatever the store raises is a StoreError."""
    try:
        store.read_into(page, parts)
    except StoreError:
        raise
    except Exception as error:
        raise _unreadable(page, error) from error


def locate(store: AddressedStore, page: int) -> Sequence[int]:
    """``store.addresses``; whatever the store raises is a StoreError."""
    try:
        return store.addresses(page)
    except StoreError:
        raise
    except Exception as error:
        raise _unreadable(page, error) from error


def _unreadable(page: int, error: Exception) -> StoreError:
    return StoreError(f"page {page} cannot be read: {line(error, repr)}")
