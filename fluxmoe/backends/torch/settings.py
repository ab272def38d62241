"""Conversion of the arguments of ``fluxmoe.page`` and ``fluxmoe.load`` to a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fluxmoe import config as fluxmoe_config
from fluxmoe import machine, sizes
from fluxmoe.backends import budget, preflight
from fluxmoe.backends.partition import least_experts
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.host import frame_bytes_for
from fluxmoe.core.types import Geometry, PageClass
from fluxmoe.errors import BudgetTooSmallError, ConfigError
from fluxmoe.findings import Findings

StoreSpec = Mapping[str, Any]

#: The default stores.
HOST: tuple[StoreSpec, ...] = ({"kind": "host"},)


def settings(
    where: str,
    memory: int | str,
    found: Findings,
    *,
    stores: Sequence[StoreSpec] = HOST,
    banks: int = 1,
    **others: Any,
) -> fluxmoe_config.Config | None:
    """Convert the arguments of ``fluxmoe.page`` to a configuration. See ``config.parse_most``."""
    given: Any = stores  # may have any type, which the configuration validates
    if isinstance(given, list | tuple):
        given = [dict(store) if isinstance(store, Mapping) else store for store in given]
    pages = {"memory": {"budget": memory, "banks": banks}, "stores": given}
    return fluxmoe_config.parse_most({**pages, **others}, found, where=where)


def given(config: fluxmoe_config.Config, where: str) -> int:
    """Return the budget in bytes. Raises ConfigError for ``auto``, which needs an engine."""
    if config.memory.budget is None:
        raise ConfigError(
            "auto is not supported here", where=f"memory of {where}", fix="use a size such as 4GiB"
        )
    return int(config.memory.budget)


class Room:
    """Bounds of the memory for expert pages, from the minimum of one bank to all experts.

    Args:
        geometry, page_class: Numbers of layers and experts, and the layout of a page.
        minimum: Minimum number of slots of a bank: the experts of one token if layers may run in
            waves; by default one layer's experts.

    Attributes:
        geometry, page_class: Numbers of layers and experts, and the layout of a page.
        frame_bytes: Bytes of a frame, the unit of growth.
        least, most: Bounds in bytes, multiples of a frame; ``most`` fits the machine's memory
            unless ``least`` does not.
    """

    def __init__(
        self, geometry: Geometry, page_class: PageClass, minimum: int | None = None
    ) -> None:
        self.geometry, self.page_class = geometry, page_class
        self.frame_bytes = frame = frame_bytes_for(geometry.num_pages * page_class.nbytes)
        self._minimum = minimum or geometry.experts_per_layer
        self.least = frames_for(page_class, self._minimum, frame) * frame
        total = machine.memory().total // frame * frame
        useful = frames_for(page_class, geometry.num_pages, frame) * frame
        self.most = max(self.least, min(useful, total))

    @property
    def nbytes(self) -> int:
        """Bytes of all expert pages."""
        return self.geometry.num_pages * self.page_class.nbytes

    def within(self, memory: int, where: str) -> int:
        """Limit ``memory`` to the number of bytes that expert pages can use.

        Raises:
            BudgetTooSmallError: ``memory`` is less than ``least`` bytes.
        """
        if memory < self.least:
            raise BudgetTooSmallError(
                f"{sizes.shown(memory)} cannot hold "
                f"{least_experts(self.geometry, self._minimum)}, "
                f"{sizes.shown(self.page_class.nbytes)} each",
                where=f"memory of {where}",
                fix=f"give at least {sizes.at_least(self.least)}",
            )
        return min(memory, self.most)

    def fit(self, config: fluxmoe_config.Config, where: str) -> fluxmoe_config.Resolved:
        """Limit the configuration's budget to the maximum that expert pages can use."""
        resolved = config.resolved(self.within(given(config, where), where))
        memory = resolved.memory.model_copy(
            update={"frame": self.frame_bytes, "kv": fluxmoe_config.Share(max=0)}
        )
        return resolved.model_copy(update={"memory": memory})


def fit(
    room: Room,
    config: fluxmoe_config.Config,
    found: Findings,
    where: str,
    *,
    others: int | None = None,
) -> fluxmoe_config.Resolved | None:
    """Limit the budget with ``Room.fit``; check the budget, the machine's memory and the stores.

    Args:
        room: Sizes of the model's experts.
        config: The configuration; its settings in ``found.wrong`` are ignored.
        found: Receives errors and notes.
        where: Name of the caller.
        others: Bytes of the weights that are not experts; None if all weights are loaded already.
    """
    resolved = found.result(room.fit, config, where) if found.reliable("memory") else None
    if resolved is not None:
        with found.check():
            if others is None or not found.reliable("stores"):
                budget.require_free(resolved.memory.budget)
            else:
                budget.require_for_weights(resolved, experts=room.nbytes, others=others)
    preflight.check_stores(config, room.nbytes, found)
    preflight.check_machine(resolved or config, 1, found)
    return resolved
