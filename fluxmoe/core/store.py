"""What the pager asks of a store: to write a page's parts where the caller wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fluxmoe.core.types import Bytes


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
