"""The contract that readers of foreign formats fulfil, and their options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy.typing as npt

from fluxmoe.arguments import whole
from fluxmoe.core.types import Phase
from fluxmoe.errors import TraceError


class ForeignEvent(NamedTuple):
    """Routing of T tokens in one layer; experts and layers are numbered as in the file.

    Attributes:
        step: Forward pass, increasing.
        layer: Layer number in the file, increasing within a step; dense layers may be counted too.
        ids: Expert numbers, integers ``[T, any]``; negative = none.
        phase: Phase of the step.
        request: Number of the request that the tokens belong to; −1 = unknown.
        weights: Routing weights, shaped like ``ids``; None if the file has none.
    """

    step: int
    layer: int
    ids: npt.NDArray[Any]
    phase: Phase
    request: int = -1
    weights: npt.NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """Facts that a file may not contain.

    Attributes:
        step_tokens: Number of tokens per step, for files without steps (flame).
        prompt_tokens: Number of prompt tokens of each request; they form one prefill step (vllm).
    """

    step_tokens: int = 1
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        whole(self.step_tokens, "step_tokens", where="--step-tokens")
        whole(self.prompt_tokens, "prompt_tokens", where="--prompt-tokens", least=0)


class Reader(ABC):
    """Streaming reader of a file or folder of one format; the events can be read repeatedly.

    Args:
        path: A file, or a folder of files.
        options: Facts that the file does not contain.
    """

    #: Value of ``--from``.
    name: ClassVar[str]
    #: One-line description for error messages and documentation.
    summary: ClassVar[str]

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.options = path, options

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Return True if a file or folder seems to have this format.

        Args:
            path: An existing file or folder.
            head: First 64 bytes of the file; empty for a folder.
        """

    @abstractmethod
    def events(self) -> Iterator[ForeignEvent]:
        """Yield all events in order.

        Raises:
            TraceError: The file violates the format.
        """

    def wrong(self, what: str, where: str = "") -> TraceError:
        """Make an error about this file; ``where`` is a location inside the file."""
        return TraceError(
            what,
            where=f"{self.path}, {where}" if where else str(self.path),
            fix=f"format {self.name} is {self.summary}",
        )
