"""All errors that a user can encounter, each with a stable code.

The text of an error is ``FMxxx: what; where; fix``, also in tracebacks and logs. The command line
prints ``error[FMxxx]: what; where; fix`` and exits with status 2. Codes are never reused, since
scripts and third-party documentation may refer to them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, TypeVar

from fluxmoe.words import printable


class FluxMoEError(Exception):
    """Base class of all errors that FluxMoE raises on purpose.

    Args:
        what: The problem, including the offending value.
        where: The field, file or call in which the problem was found; may be empty.
        fix: The remedy available to the user; may be empty.

    Attributes:
        others: Further errors found at the same time; ``str`` returns a line for each error.
    """

    code: ClassVar[str] = "FM000"

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        self.others: tuple[FluxMoEError, ...] = ()
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join(f"{error.code}: {error.text}" for error in self.problems())

    @property
    def text(self) -> str:
        """The message without its code, and without ``others``: ``what; where; fix``.

        It is one line, even if a path or a name in it has line breaks; only the log that an
        ``EngineError`` has as its ``where`` keeps them.
        """
        where = self.where if isinstance(self, EngineError) else printable(self.where)
        return join(printable(self.what), where, printable(self.fix))

    def problems(self) -> list[FluxMoEError]:
        """List this error and the others."""
        return [self, *self.others]

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries, since the engine runs in a child process; the default
        # would lose the keyword arguments.
        return (_rebuild, (type(self), self.what, self.where, self.fix, self.others))


def _rebuild(
    cls: type[FluxMoEError], what: str, where: str, fix: str, others: tuple[FluxMoEError, ...]
) -> FluxMoEError:
    error = cls.__new__(cls)
    FluxMoEError.__init__(error, what, where=where, fix=fix)
    error.others = others
    return error


_Error = TypeVar("_Error", bound=FluxMoEError)


def together(errors: Sequence[_Error]) -> _Error:
    """Combine errors for one ``raise``: return the first, with the rest in ``others``."""
    # Without duplicates: an error may also be among the others of an earlier error.
    _, *rest = dict.fromkeys(each for error in errors for each in error.problems())
    errors[0].others = tuple(rest)
    return errors[0]


def join(*parts: str) -> str:
    """Join the parts of a message that are not empty, separated by semicolons."""
    return "; ".join(part for part in parts if part)


def meant(name: object, known: Iterable[str]) -> str:
    """Return ``did you mean 'lru'?`` if a known name resembles ``name``, otherwise empty text."""
    near = difflib.get_close_matches(str(name), list(known), n=1) if name else []
    return f"did you mean {near[0]!r}?" if near else ""


# --- configuration -----------------------------------------------------------------------------


class ConfigError(FluxMoEError):
    """A configuration key or an argument has an invalid value."""

    code = "FM101"


class BudgetTooSmallError(ConfigError):
    """The memory budget cannot hold the minimum that the experts and the KV cache need."""

    code = "FM102"


# --- plugins and policies ----------------------------------------------------------------------


class UnknownPolicyError(FluxMoEError):
    """No plugin has registered a policy of this name."""

    code = "FM201"

    def __init__(
        self, kind: str, name: str, known: Iterable[str], broken: Mapping[str, str] | None = None
    ) -> None:
        fix = _known(f"{kind} policies", name, known, broken)
        super().__init__(f"unknown {kind} policy {name!r}", fix=fix)


def _known(what: str, name: str, known: Iterable[str], broken: Mapping[str, str] | None) -> str:
    """List the known names, and the broken plugins that may define the unknown one."""
    names = sorted(known)
    parts = [meant(name, names), f"known {what}: {', '.join(names)}"]
    for plugin, reason in (broken or {}).items():
        parts.append(f"the installed plugin {plugin} is broken: {reason}")
    return join(*parts)


class PluginLoadError(FluxMoEError):
    """A plugin cannot be imported or registered."""

    code = "FM202"


class PolicyFaultError(FluxMoEError):
    """A policy raised, took too long or returned an invalid answer, and faults are not contained.

    Even if faults are contained, the error is raised if ``score_kernel`` does not compile or
    ``make_kernel`` fails.
    """

    code = "FM203"


class NeedsFutureError(FluxMoEError):
    """An oracle, which needs to know the future, was requested where the future is unknown."""

    code = "FM204"


# --- memory ------------------------------------------------------------------------------------


class SubstrateError(FluxMoEError):
    """The operating system or the driver failed to reserve, create, commit or release memory."""

    code = "FM301"


class OutOfFramesError(FluxMoEError):
    """A tenant requested more frames than are free in the budget."""

    code = "FM302"


class InvariantError(FluxMoEError):
    """The books contradict themselves or the memory; this is a bug in FluxMoE: please report it."""

    code = "FM303"


class StoreError(FluxMoEError):
    """A page could not be read from its store."""

    code = "FM304"


class CodecError(StoreError):
    """The data that a lossless codec should decode is damaged or has another format."""

    code = "FM305"


class PageFileError(StoreError):
    """A page file cannot be written or read, is damaged, or contains different pages."""

    code = "FM307"


class UnknownCodecError(FluxMoEError):
    """No plugin has registered a codec of this name."""

    code = "FM306"

    def __init__(
        self, name: str, known: Iterable[str], broken: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"unknown codec {name!r}", fix=_known("codecs", name, known, broken))


class DeviceMemoryError(SubstrateError):
    """The GPU has no memory for another frame."""

    code = "FM308"


# --- backends ----------------------------------------------------------------------------------


class NoExpertsError(FluxMoEError):
    """The model has no MoE layers, so there is nothing to page."""

    code = "FM401"


class UnsupportedError(FluxMoEError):
    """FluxMoE does not support an architecture, a feature or a device (yet)."""

    code = "FM402"


class QuantisedError(UnsupportedError):
    """A checkpoint has quantised experts, which cannot be paged yet."""

    code = "FM407"


class UnsupportedVersionError(FluxMoEError):
    """An engine's version is outside the range with which FluxMoE was tested."""

    code = "FM403"


class MissingDependencyError(FluxMoEError):
    """A required optional package is not installed."""

    code = "FM404"


class EngineError(FluxMoEError):
    """The inference engine failed to start or to respond."""

    code = "FM405"


class CheckpointError(FluxMoEError):
    """A model's files are missing, damaged or truncated, or lack experts."""

    code = "FM406"


class WeightsError(FluxMoEError):
    """New weights for a running model do not fit the model, or cannot be adopted now.

    The old weights remain in use.
    """

    code = "FM408"


# --- traces and the simulator ------------------------------------------------------------------


class TraceError(FluxMoEError):
    """A trace cannot be read or written, is damaged or unsorted, or violates the format."""

    code = "FM501"


class CapacityError(FluxMoEError):
    """A capacity is below the largest event, and no event may be split (event rule, point 8)."""

    code = "FM502"
