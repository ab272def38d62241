"""All errors a user can encounter, each with a stable code.

The command line prints them as ``error[FMxxx]: what, where, what to do`` and exits with status 2.
Codes are never reused: scripts and third-party documentation may refer to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar


class FluxMoEError(Exception):
    """Base class of all errors that FluxMoE raises on purpose.

    Args:
        what: The problem, naming the value.
        where: The field, file or call in which it was found (may be empty).
        fix: The remedy available to the user (may be empty).
    """

    code: ClassVar[str] = "FM000"

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__("; ".join(part for part in (what, where, fix) if part))

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (the engine runs in a child); keyword arguments must too.
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(cls: type[FluxMoEError], what: str, where: str, fix: str) -> FluxMoEError:
    error = cls.__new__(cls)
    FluxMoEError.__init__(error, what, where=where, fix=fix)
    return error


class SeveralErrors(FluxMoEError):
    """Several independent errors, found by the checks before a start.

    Args:
        errors: At least two errors. ``code`` is that of the first.
    """

    def __init__(self, errors: Iterable[FluxMoEError]) -> None:
        self.errors = tuple(errors)
        self.code = self.errors[0].code  # type: ignore[misc]
        super().__init__("\n".join(map(str, self.errors)))

    def __reduce__(self) -> tuple[object, ...]:
        return SeveralErrors, (self.errors,)


# --- configuration -----------------------------------------------------------------------------


class ConfigError(FluxMoEError):
    """A key of the configuration, or an argument, has a value that cannot be used."""

    code = "FM101"


class BudgetTooSmallError(ConfigError):
    """The memory budget cannot hold the least that experts and KV cache need."""

    code = "FM102"


# --- plugins and policies ----------------------------------------------------------------------


class UnknownPolicyError(FluxMoEError):
    """A policy name that no plugin has registered."""

    code = "FM201"

    def __init__(
        self, kind: str, name: str, known: Iterable[str], broken: Mapping[str, str] | None = None
    ) -> None:
        fix = _known(f"{kind} policies", known, broken)
        super().__init__(f"unknown {kind} policy {name!r}", fix=fix)


def _known(what: str, known: Iterable[str], broken: Mapping[str, str] | None) -> str:
    """List the known names, and the plugins that failed to load and may define the unknown one."""
    parts = [f"known {what}: {', '.join(sorted(known))}"]
    for plugin, reason in (broken or {}).items():
        parts.append(f"the installed plugin {plugin} is broken: {reason}")
    return "; ".join(parts)


class PluginLoadError(FluxMoEError):
    """A plugin that cannot be imported or registered."""

    code = "FM202"


class PolicyFaultError(FluxMoEError):
    """A policy raised or returned an unusable answer under ``--strict-policies``.

    In every mode: its ``score_kernel`` does not compile, or ``make_kernel`` takes too long.
    """

    code = "FM203"


class NeedsFutureError(FluxMoEError):
    """An oracle policy was requested where the future is not known."""

    code = "FM204"


# --- memory ------------------------------------------------------------------------------------


class SubstrateError(FluxMoEError):
    """The operating system or the driver refused to reserve, create, commit or release memory."""

    code = "FM301"


class OutOfFramesError(FluxMoEError):
    """A tenant asked for more frames than the budget has free."""

    code = "FM302"


class InvariantError(FluxMoEError):
    """The accounts contradict themselves or the memory: a bug in FluxMoE, please report it."""

    code = "FM303"


class StoreError(FluxMoEError):
    """A page could not be read from its store."""

    code = "FM304"


class CodecError(StoreError):
    """The data given to a lossless codec to decode is damaged or of another format."""

    code = "FM305"


class PageFileError(StoreError):
    """A page file cannot be written or read, is damaged, or holds other pages."""

    code = "FM307"


class UnknownCodecError(FluxMoEError):
    """A codec name that no plugin has registered."""

    code = "FM306"

    def __init__(
        self, name: str, known: Iterable[str], broken: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"unknown codec {name!r}", fix=_known("codecs", known, broken))


class DeviceMemoryError(SubstrateError):
    """The GPU has no memory left for another frame."""

    code = "FM308"


# --- backends ----------------------------------------------------------------------------------


class NoExpertsError(FluxMoEError):
    """The model has no MoE layers: there is nothing to page."""

    code = "FM401"


class UnsupportedError(FluxMoEError):
    """An architecture, a feature or a device that FluxMoE does not handle (yet)."""

    code = "FM402"


class QuantisedError(UnsupportedError):
    """A checkpoint with quantised experts.

    Args:
        found: The quantisation found.
        where: The file or folder.
    """

    def __init__(self, found: str, *, where: str) -> None:
        super().__init__(
            f"{found}, and quantised experts cannot be paged yet",
            where=where,
            fix="use an unquantised (bf16, fp16 or fp32) checkpoint",
        )


class UnsupportedVersionError(FluxMoEError):
    """A version of the engine outside the range FluxMoE was tested with."""

    code = "FM403"


class MissingDependencyError(FluxMoEError):
    """An optional package that this command needs is not installed."""

    code = "FM404"


class EngineError(FluxMoEError):
    """The inference engine failed to start or to answer."""

    code = "FM405"


class CheckpointError(FluxMoEError):
    """A model's files are missing, damaged or cut off, or lack experts."""

    code = "FM406"


# --- traces and the simulator ------------------------------------------------------------------


class TraceError(FluxMoEError):
    """A trace file that is damaged, unsorted or does not follow the format."""

    code = "FM501"


class CapacityError(FluxMoEError):
    """A capacity below the largest event: no event may be split (event rule, point 8)."""

    code = "FM502"
