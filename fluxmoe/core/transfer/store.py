"""The contract of stores: they write the parts of pages into rows that the caller provides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

from fluxmoe.core.transfer.jobs import Urgency
from fluxmoe.core.types import Bytes, Int64s
from fluxmoe.errors import StoreError
from fluxmoe.words import interrupts, line

#: Copies page ``pages[i]`` into row ``slots[i]`` for all ``i``. Several threads call it at once.
Reader = Callable[[Int64s, Int64s], None]
#: Takes a page and its new contents, one uint8 row per part. The rows may change afterwards.
Put: TypeAlias = Callable[[int, Sequence[Bytes]], None]


class Store(Protocol):
    """A source of expert pages. Several threads call ``read_into`` concurrently."""

    @property
    def nbytes(self) -> int:
        """The bytes of memory or disk space that the store occupies."""

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
        """Replace pages at the end of the ``with`` block: all pages that were put within it.

        If the block raises an exception, no page is replaced. Until the block ends, ``read_into``
        reads the old pages. No page may be read while pages are being replaced.

        Raises:
            StoreError: A page cannot be kept or was put twice. No page was replaced.
        """


@runtime_checkable
class BatchStore(Store, Protocol):
    """A store that reads many pages in one call."""

    def reader(self, arenas: Sequence[Bytes]) -> Reader:
        """Make a reader that copies pages into ``arenas``.

        The reader raises StoreError if a page could not be read; which of the other pages were
        copied is then undefined.

        Args:
            arenas: One uint8 array ``[slots, part bytes]`` per part, in order. Their memory must
                stay where it is for as long as the reader is used.
        """


class Read(Protocol):
    """A read of one page into a slot by a read thread of the store.

    A read has two steps: a read thread reads the stored bytes, and ``finish`` converts these bytes
    into the page. The methods must not be called concurrently.
    """

    def begin(self, urgency: Urgency) -> None:
        """Order the first step.

        After an interruption, the step may or may not have been ordered. The caller must therefore
        keep a reference to the read before this call.
        """

    def withdraw(self) -> bool:
        """Cancel the read if it has not begun; return True if it was cancelled."""

    def finish(self) -> None:
        """Complete the page; take the first step as well if no read thread has begun it.

        Raises:
            StoreError: The page could not be read; the slot's contents are undefined.
        """

    def settle(self) -> None:
        """Cancel the read or wait for its first step; afterwards, nothing writes to the slot."""


#: Prepares the read of a page into a slot; returns None if no read thread should read the page.
Ahead = Callable[[int, int], Read | None]


@runtime_checkable
class AheadStore(BatchStore, Protocol):
    """A store with read threads, which read while the callers do other work."""

    def ahead(self, arenas: Sequence[Bytes]) -> Ahead:
        """Make a function that prepares reads into ``arenas``; see ``BatchStore.reader``."""


@runtime_checkable
class AddressedStore(Store, Protocol):
    """A store whose pages are in page-locked memory, where a device can fetch them directly."""

    def addresses(self, page: int) -> Sequence[int]:
        """Return the start addresses of a page's parts, in order, valid until the store is closed.

        Raises:
            StoreError: The page is not in the store.
        """


def read(store: Store, page: int, parts: Sequence[Bytes]) -> None:
    """Call ``store.read_into``; turn exceptions but those of signal handlers into StoreError."""
    try:
        store.read_into(page, parts)
    except StoreError:
        raise
    except Exception as error:
        if interrupts(error):
            raise
        raise _unreadable(f"page {page}", error) from error


def reader(store: Store, arenas: Sequence[Bytes]) -> Reader:
    """Make a reader of a store's pages that turns exceptions into a StoreError (see ``read``)."""
    if isinstance(store, BatchStore):
        return partial(_together, store.reader(arenas))
    return partial(_one_by_one, store, arenas)


def ahead(store: Store, arenas: Sequence[Bytes]) -> Ahead:
    """Make a function that prepares reads of a store's pages by the store's read threads."""
    return store.ahead(arenas) if isinstance(store, AheadStore) else lambda page, slot: None


def _together(read_all: Reader, pages: Int64s, slots: Int64s) -> None:
    try:
        read_all(pages, slots)
    except StoreError:
        raise
    except Exception as error:
        if interrupts(error):
            raise
        raise _unreadable(f"one of the pages {pages.tolist()}", error) from error


def _one_by_one(store: Store, arenas: Sequence[Bytes], pages: Int64s, slots: Int64s) -> None:
    for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
        read(store, page, [rows[slot] for rows in arenas])


def locate(store: AddressedStore, page: int) -> Sequence[int]:
    """Call ``store.addresses``; turn exceptions but those of signal handlers into StoreError."""
    try:
        return store.addresses(page)
    except StoreError:
        raise
    except Exception as error:
        if interrupts(error):
            raise
        raise _unreadable(f"page {page}", error) from error


def _unreadable(what: str, error: Exception) -> StoreError:
    return StoreError(f"{what} cannot be read: {line(error, repr)}")
