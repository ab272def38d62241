"""The contract of codecs, as tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fluxmoe.core.policy.watchdog import HardLimitExceeded, Limits, TimeLimiter
from fluxmoe.core.types import Bytes
from fluxmoe.errors import CodecError
from fluxmoe.stores.codec.base import Codec
from fluxmoe.testing.conformance.common import check_signature, new
from fluxmoe.testing.conformance.report import Broken, Finding, Rule, raise_broken, try_rules
from fluxmoe.words import line, raised

Factory = Callable[[], Codec]

#: Coding a part of a page takes far less time, but the first call may compile code.
_LIMITS = Limits(hard_s=60.0)
_FENCE = 64  # number of bytes before and after `out` that a codec must not write
_NOT_FOR = "raise fluxmoe.errors.CodecError"


def check_codec(factory: Factory) -> None:
    """Test a codec against its contract.

    Args:
        factory: The codec's class, or a function that makes a codec.

    Raises:
        ConformanceError: A rule is broken; the message gives the rule, the call and the remedy.
    """
    raise_broken("a codec does not conform", findings, factory)


def findings(factory: Factory) -> list[Finding]:
    """Test every rule and return the results."""
    return try_rules(RULES, factory)


def parts() -> Iterator[tuple[str, Bytes]]:
    """Yield named inputs, small and large, likely and unlikely."""
    rng = np.random.default_rng(11)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    weights = (rng.standard_normal(1 << 15) * 0.02).astype(np.float32)
    bf16 = (weights.view(np.uint32) >> 16).astype(np.uint16)
    yield "no bytes", np.zeros(0, np.uint8)
    yield "one byte", np.full(1, 7, np.uint8)
    yield "zeros", np.zeros(4096, np.uint8)
    yield "bf16 weights", bf16.view(np.uint8)
    yield "an odd number of bytes", bf16.view(np.uint8)[:4097]
    yield "bytes at an odd address", bf16.view(np.uint8)[1:8193]
    yield "all 65536 bf16 values", rng.permuted(patterns).view(np.uint8)
    yield "random bytes", rng.integers(0, 256, 10_000).astype(np.uint8)
    yield "float32 weights", weights[:4096].view(np.uint8)


def _made(factory: Factory) -> None:
    codec = new(factory)
    if not isinstance(codec, Codec):
        raise Broken(
            f"the factory made {line(codec, repr)}", mend="derive the codec from fluxmoe.Codec"
        )


def _declares(factory: Factory) -> None:
    codec = factory()
    check_signature(codec.encode, "encode", ("raw",))
    check_signature(codec.decode, "decode", ("coded", "out"))


def _lossless(factory: Factory) -> None:
    codec = factory()
    for name, raw in parts():
        coded = _encode(codec, name, raw)
        if len(coded):
            _same(raw, _decode(codec, name, coded, len(raw)), name)


def _encode(codec: Codec, name: str, raw: Bytes) -> Bytes:
    call, shown = f"encode of {name} ({len(raw)} bytes)", raw.copy()
    shown.flags.writeable = False  # like a page in a mapped file
    coded = _call(lambda: codec.encode(shown), call)
    if not isinstance(coded, np.ndarray) or coded.dtype != np.uint8 or coded.ndim != 1:
        raise Broken(
            f"it returned {line(coded, repr, limit=200)}", call=call, mend="return a uint8 array"
        )
    if np.shares_memory(coded, shown):
        raise Broken(
            "it returned a view of `raw`",
            call=call,
            mend="return a copy, or an empty array if nothing is gained",
        )
    return coded


def _decode(codec: Codec, name: str, coded: Bytes, size: int) -> Bytes:
    """Decode into memory with a fence around it, filled with a pattern."""
    call, field = f"decode of {name} ({size} bytes)", np.full(size + 2 * _FENCE, 0xA5, np.uint8)
    shown = coded.copy()
    shown.flags.writeable = False
    answer = _call(lambda: codec.decode(shown, field[_FENCE : _FENCE + size]), call)
    _check_fence(field, call)
    if answer is not None:
        raise Broken(
            f"it returned {line(answer, repr, limit=200)}",
            call=call,
            mend="write to `out`, return nothing",
        )
    return field[_FENCE : _FENCE + size]


def _check_fence(field: Bytes, call: str) -> None:
    fence = np.concatenate([field[:_FENCE], field[-_FENCE:]])
    if (fence != 0xA5).any():
        raise Broken("it wrote beyond `out`", call=call, mend="write to `out` and nothing else")


def _call(function: Callable[[], object], call: str) -> object:
    try:
        return TimeLimiter(_LIMITS).call(function, ())
    except HardLimitExceeded:
        raise Broken(f"it took more than {_LIMITS.hard_s:g} s", call=call) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        mend = "copy `raw`: it is read-only" if "read-only" in line(error) else ""
        raise Broken(f"it raised {raised(error)}", call=call, mend=mend) from error


def _same(raw: Bytes, back: Bytes, name: str) -> None:
    differ = np.flatnonzero(raw != back)
    if len(differ):
        at = int(differ[0])
        raise Broken(
            f"byte {at} of {len(raw)} was {raw[at]} and was restored as {back[at]}",
            call=f"encode and decode of {name}",
            mend="restore every bit, including NaNs and odd bytes",
        )


def _repeats(factory: Factory) -> None:
    first, second = factory(), factory()
    for name, raw in parts():
        coded = _encode(first, name, raw)
        if not np.array_equal(coded, _encode(second, name, raw)):
            raise Broken(
                "two codecs of one kind encode it differently",
                call=f"encode of {name}",
                mend="make the code depend only on `raw` and the options, not on time or state",
            )
        if len(coded):  # one process may read the data that another has written
            _same(raw, _decode(second, name, coded, len(raw)), name)


def _refuses(factory: Factory) -> None:
    codec = factory()
    for name, raw in parts():
        coded = _encode(codec, name, raw)
        if not len(coded) or len(raw) < 2:
            continue
        for what, damaged, size in (
            ("cut in half", coded[: len(coded) // 2], len(raw)),
            ("a byte short", coded[:-1], len(raw)),
            ("of no bytes", coded[:0], len(raw)),
            ("for a larger part", coded, len(raw) + 2),
            ("for a smaller part", coded, len(raw) - 2),
        ):
            if not _is_refused(codec, f"{name}, {what}", damaged, size):
                raise Broken(
                    "it was decoded",
                    call=f"decode of {name}, {what}",
                    mend=f"store the size in the code, and {_NOT_FOR} if `out` has another size",
                )


def _survives(factory: Factory) -> None:
    """Check that flipped bits are rejected, or decoded without side effects."""
    codec, rng = factory(), np.random.default_rng(5)
    for name, raw in parts():
        coded = _encode(codec, name, raw)
        if not len(coded):
            continue
        for place in [0, 1, 2, 3, len(coded) - 1, *rng.integers(0, len(coded), 40)]:
            damaged = coded.copy()
            damaged[min(place, len(coded) - 1)] ^= 1 << int(rng.integers(8))
            _is_refused(codec, f"{name}, a bit of byte {place} flipped", damaged, len(raw))


def _is_refused(codec: Codec, name: str, coded: Bytes, size: int) -> bool:
    field = np.full(size + 2 * _FENCE, 0xA5, np.uint8)

    def decode() -> bool:
        try:
            codec.decode(coded, field[_FENCE : _FENCE + size])
        except CodecError:
            return True
        return False

    call = f"decode of {name}"
    try:
        refused = bool(_call(decode, call))
    except Broken as broken:
        raise Broken(broken.found, call=call, mend=f"{_NOT_FOR} for damaged data") from broken
    _check_fence(field, call)
    return refused


def _shared(factory: Factory) -> None:
    codec, given = factory(), list(parts()) * 4

    def work(index: int) -> None:
        name, raw = given[index]
        coded = _encode(codec, name, raw)
        if len(coded):
            _same(raw, _decode(codec, name, coded, len(raw)), name)

    with ThreadPoolExecutor(4) as pool:
        try:
            list(pool.map(work, range(len(given))))
        except Broken as broken:
            raise Broken(
                broken.found,
                call=f"{broken.call}, four threads at once",
                mend="keep no state in self while coding: one codec serves all copy threads",
            ) from broken


RULES: list[Rule[Factory]] = [
    Rule("made", "the factory makes a codec", _made, essential=True),
    Rule("declared", "parameters are as the host expects", _declares, essential=True),
    Rule(
        "lossless",
        "every part is restored bit for bit, and nothing else is written",
        _lossless,
        True,
    ),
    Rule("repeats", "another process encodes and decodes the same", _repeats),
    Rule("refuses", "truncated data and data for another size are refused", _refuses),
    Rule("survives", "damaged data is refused with CodecError, or decoded within `out`", _survives),
    Rule("shared", "several threads can use one codec at once", _shared),
]
