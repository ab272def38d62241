"""Answers of policies: each is copied into a plain value of the host, and the copy is validated.

An answer may be active code: a list whose ``__len__`` blocks, an array that a thread continues to
write to, a number whose methods return false values, or text that cannot be printed. So each
function here reads an answer once, into an array or a number that nothing else refers to, and reads
no more than a valid answer can contain. An invalid answer raises ``InvalidAnswer``. The functions
run as part of the policy's call (``faults``), so their time is limited and any exception is
contained.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.policy.arbitration import ArbitrationView, Split
from fluxmoe.core.types import Bools, Int64s
from fluxmoe.words import line


class InvalidAnswer(Exception):
    """An answer is invalid; the message describes the problem."""


def nothing(answer: object) -> None:
    """Ignore the answer of a hook."""


def scores(answer: object, count: int) -> npt.NDArray[Any]:
    """Read ``count`` integers or floats, without NaN, into a dtype that numba supports."""
    numbers = _array(answer, count, f"not {count} numbers")
    if numbers.dtype.kind not in "iuf" or numbers.shape != (count,):
        raise InvalidAnswer(f"returned {_described(numbers)}, not {count} numbers")
    if numbers.dtype.kind == "f" and np.isnan(numbers).any():
        raise InvalidAnswer("returned NaN")
    # numba supports neither half precision nor long double.
    odd = numbers.dtype.kind == "f" and numbers.dtype.itemsize not in (4, 8)
    return numbers.astype(np.float64) if odd else numbers


def bools(answer: object, count: int) -> Bools:
    """Read ``count`` bools."""
    found = _array(answer, count, f"not {count} bools")
    if found.dtype != np.bool_ or found.shape != (count,):
        raise InvalidAnswer(f"returned {_described(found)}, not {count} bools")
    return found


def victims(answer: object, candidates: Int64s, count: int) -> Int64s:
    """Read ``count`` different pages that are among ``candidates``."""
    pages = _array(answer, count, f"not {count} pages")
    if pages.dtype.kind not in "iu" or pages.shape != (count,):
        raise InvalidAnswer(f"returned {_described(pages)}, not {count} pages")
    pages = pages.astype(np.int64)
    if len(np.unique(pages)) != count or not np.isin(pages, candidates).all():
        raise InvalidAnswer("returned a duplicate or a page that was not a candidate")
    return pages


def proposals(answer: object, layer: int, num_layers: int, experts: int) -> Int64s:
    """Read pages of layers other than ``layer``, at most as many as the model has; drop repeats."""
    most = num_layers * experts
    pages = _array(answer, most, f"more than the model's {most} pages")
    if pages.size == 0:
        return np.zeros(0, np.int64)
    if pages.dtype.kind not in "iu" or pages.ndim != 1:
        raise InvalidAnswer(f"returned {_described(pages)}, not a list of pages")
    if pages.min() < 0 or pages.max() >= most:
        raise InvalidAnswer(f"returned a page outside 0…{most - 1}")
    pages = pages.astype(np.int64)
    if np.any(pages // experts == layer):
        raise InvalidAnswer("returned a page of the current layer")
    first = np.unique(pages, return_index=True)[1]
    return pages[np.sort(first)]


def split(answer: object, view: ArbitrationView) -> Split:
    """Read each tenant's number of frames, and the reason as one printable line."""
    if not isinstance(answer, Split):
        raise InvalidAnswer(f"returned {line(answer, repr)}, not a Split")
    frames, reason = answer.frames, answer.reason
    if frames is view.frames and type(reason) is str:
        return Split(view.frames, line(reason))  # the usual case: no change
    if not isinstance(frames, Mapping):
        raise InvalidAnswer(f"returned {line(answer, repr)}, not a Split")
    given: Mapping[Any, object] = frames
    names = list(islice(given, len(view.frames) + 1))
    if {str.__str__(name) for name in names if isinstance(name, str)} != set(view.frames) or (
        len(names) != len(view.frames)
    ):
        shown = line(sorted(line(name) for name in names))
        raise InvalidAnswer(f"returned frames for {shown}, not for {sorted(view.frames)}")
    counts = {str.__str__(name): _frames(given[name], name) for name in names}
    # The current split is always valid, even if the limit has just been lowered.
    if sum(counts.values()) > max(view.total_frames, sum(view.frames.values())):
        raise InvalidAnswer(
            f"returned {line(sum(counts.values()))} frames, but there are {view.total_frames}"
        )
    if not isinstance(reason, str):
        raise InvalidAnswer(f"returned {line(reason, repr)} as a reason")
    # The reason ends up in the log, in messages between processes and in a metric label.
    return Split(counts, line(reason))


def flag(value: object) -> bool:
    """Read a declaration that is True or False."""
    if not isinstance(value, bool):
        raise InvalidAnswer(f"is {line(value, repr)}, not True or False")
    return value


def whole(value: object, least: int, noun: str) -> int:
    """Read a declaration that is an integer of at least ``least``."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = operator.index(value)  # a plain int, even if the class is a subclass of int
        if number >= least:
            return number
    raise InvalidAnswer(f"is {line(value, repr)}, not a number of {noun}")


def share(value: object) -> float:
    """Read a declaration that is a number of at least 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    raise InvalidAnswer(f"is {line(value, repr)}, not a number of at least 0")


def _array(answer: object, most: int, wanted: str) -> npt.NDArray[Any]:
    """Copy an answer into a contiguous array in the machine's byte order.

    An answer with more than ``most`` values is rejected before it is read.
    """
    if answer is None:
        raise InvalidAnswer("returned None")
    if not isinstance(answer, np.ndarray):
        length = operator.length_hint(answer)
        if length > most:
            raise InvalidAnswer(f"returned {length} values, {wanted}")
    # A subclass of ndarray, such as a masked array, may not behave as the host expects.
    array = np.asarray(answer)
    if array.size > most:
        raise InvalidAnswer(f"returned {_described(array)}, {wanted}")
    copy = np.array(array, order="C")
    return copy if copy.dtype.isnative else copy.astype(copy.dtype.newbyteorder("="))


def _described(array: npt.NDArray[Any]) -> str:
    if array.ndim == 0 and array.dtype == object:
        return line(array.item(), repr)
    return line(f"{array.dtype} of shape {array.shape}")


def _frames(count: object, name: object) -> int:
    try:
        number = -1 if isinstance(count, bool | np.bool_) else operator.index(count)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise InvalidAnswer(f"returned {line(count, repr)} frames for {line(name)}")
    return number
