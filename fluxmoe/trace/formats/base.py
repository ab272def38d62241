"""What a reader of somebody else's format has to tell, and what it may be told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy.typing as npt

from fluxmoe.core.types import Phase
from fluxmoe.errors import TraceError


class ForeignEvent(NamedTuple):
    """What T tokens routed to in one layer, in the file's own terms.

    Attributes:
        step: Forward pass; grows.
        layer: The file's number of the layer; grows within a step. Dense layers may have numbers.
        ids: ``[T, any]`` integers, negative = nothing.
        phase: What the step does.
        request: Whose tokens they are, −1 = unknown.
        weights: Routing weights like ``ids``, or None.
    """

    step: int
    layer: int
    ids: npt.NDArray[Any]
    phase: Phase
    request: int = -1
    weights: npt.NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What a file may not say about itself.

    Attributes:
        step_tokens: Tokens that are to make a step, where the file knows no steps (flame).
        prompt_tokens: Tokens of each request's prompt, which are one prefill step (vllm).
    """

    step_tokens: int = 1
    prompt_tokens: int = 0


class Reader(ABC):
    """Reads one format, in a stream, as often as it is asked to.

    Args:
        path: A file, or a folder of files.
        options: See there.
    """

    #: Value of ``--from``.
    name: ClassVar[str]
    #: One line for error messages and documentation.
    summary: ClassVar[str]

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.options = path, options

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Whether this looks like the format.

        Args:
            path: A file or folder that exists.
            head: The first 64 bytes of the file, nothing for a folder.
        """

    @abstractmethod
    def events(self) -> Iterator[ForeignEvent]:
        """All events in order.

        Raises:
            TraceError: The file is not what the format says.
        """

    def wrong(self, what: str, where: str = "") -> TraceError:
        """An error about this file; ``where`` is a place inside it."""
        return TraceError(
            what,
            where=f"{self.path}, {where}" if where else str(self.path),
            fix=f"format {self.name} is {self.summary}",
        )
