"""Steps of the fixed4 code that process 64 weights at once, as LLVM vectors.

Numba cannot vectorise such loops, because each step distributes the bytes of its weights to three
places. These steps are therefore written with LLVM vectors, which LLVM maps to the processor's
instructions: about 15 per step with AVX-512 VBMI.

Within a step, the weights of 64 columns are in the order of the tile's words: bytes 0 to 31 of a
vector are the bytes of the eight words of plane A, and bytes 32 to 63 are those of plane B
(docs/concepts/lossless-code.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

#: Byte of a word → column among the word's four columns.
COLUMNS = (0, 2, 1, 3)

_i1, _i8, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_SIDES = 8  # words in plane A and in plane B

#: Byte of a vector → column among the 64 columns.
_COLUMN = [8 * (i % 32 // 4) + 4 * (i // 32) + COLUMNS[i % 4] for i in range(64)]


def _vector(element: ir.Type, values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def _shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, places: Sequence[int]) -> ir.Value:
    return b.shuffle_vector(x, y, _vector(_i32, places))


def _splat(b: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    kind = ir.VectorType(value.type, count)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_i32, 0))
    return _shuffle(b, one, one, [0] * count)


def _at(context: Any, b: ir.IRBuilder, kind: Any, array: ir.Value, index: ir.Value) -> ir.Value:
    return b.gep(context.make_array(kind)(context, b, array).data, [index])


def _load(b: ir.IRBuilder, pointer: ir.Value, kind: ir.Type) -> ir.Value:
    value = b.load(b.bitcast(pointer, kind.as_pointer()))
    value.align = 1
    return value


def _store(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, *, past_caches: bool) -> None:
    made = b.store(value, b.bitcast(pointer, value.type.as_pointer()))
    made.align = 1
    if past_caches:
        made.align = 64
        made.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(_i32, 1)]))


def _join(
    b: ir.IRBuilder, low: ir.Value, high: ir.Value, out: Callable[[int], ir.Value], past: bool
) -> None:
    """Write 64 weights in column order, given the vectors of their low and high bytes."""
    order = [_COLUMN.index(column) for column in range(64)]
    for first in (0, 32):
        places = [place for i in order[first : first + 32] for place in (i, 64 + i)]
        _store(b, _shuffle(b, low, high, places), out(first), past_caches=past)


def _decoder(*, zero: bool, past_caches: bool) -> Any:
    def step(
        typing: Any, words: Any, a: Any, b: Any, nibbles: Any, base: Any, out: Any, at: Any
    ) -> Any:
        signature = types.void(
            words, types.int64, types.int64, types.int64, types.uint32, out, types.int64
        )

        def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            kinds, half = signature.args, ir.VectorType(_i32, _SIDES)
            lows = [_load(b, _at(context, b, kinds[0], args[0], i), half) for i in args[1:3]]
            low = b.bitcast(_shuffle(b, lows[0], lows[1], range(16)), ir.VectorType(_i8, 64))
            n = _load(b, _at(context, b, kinds[0], args[0], args[3]), half)
            both = _shuffle(b, n, n, [*range(8), *range(8)])
            code = b.and_(
                b.lshr(both, _vector(_i32, [4] * 8 + [0] * 8)), _vector(_i32, [0x07070707] * 16)
            )
            sign = b.and_(
                b.shl(both, _vector(_i32, [0] * 8 + [4] * 8)), _vector(_i32, [0x80808080] * 16)
            )
            bases = _splat(b, b.mul(args[4], ir.Constant(_i32, 0x01010101)), 16)
            upper = b.add(code, bases)
            if zero:
                codes, nothing = b.bitcast(code, low.type), _vector(_i8, [0] * 64)
                kept = b.select(
                    b.icmp_unsigned("==", codes, nothing), nothing, b.bitcast(upper, low.type)
                )
                upper = b.bitcast(kept, upper.type)
            high = b.bitcast(b.or_(upper, sign), low.type)
            start = _at(context, b, kinds[5], args[5], args[6])
            _join(b, low, high, lambda i: b.gep(start, [ir.Constant(_i64, i)]), past_caches)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(step)


#: ``(words, a, b, nibbles, base, out, at)``: decode 64 weights from the words at ``a``, ``b`` and
#: ``nibbles`` of the uint32 array ``words`` to ``out[at:]``, uint16.
decode_plain = _decoder(zero=False, past_caches=False)
#: As ``decode_plain``, but for the zero code.
decode_zero = _decoder(zero=True, past_caches=False)
#: As ``decode_plain``, but writes bypass the caches, so that no cache lines are fetched.
#: ``out[at:]`` must be aligned to 64 bytes. Call ``fence`` after the last call.
decode_past_caches = _decoder(zero=False, past_caches=True)


@intrinsic
def decode_raw(
    typing: Any, words: Any, a: Any, b: Any, high_a: Any, high_b: Any, out: Any, at: Any
) -> Any:
    """``(words, a, b, high_a, high_b, out, at)``: as ``decode_plain``, with uncoded high bytes."""
    signature = types.void(
        words, types.int64, types.int64, types.int64, types.int64, out, types.int64
    )

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kinds, half = signature.args, ir.VectorType(_i32, _SIDES)
        sides = [_load(b, _at(context, b, kinds[0], args[0], i), half) for i in args[1:5]]
        low, high = (
            b.bitcast(_shuffle(b, pair[0], pair[1], range(16)), ir.VectorType(_i8, 64))
            for pair in (sides[:2], sides[2:])
        )
        start = _at(context, b, kinds[5], args[5], args[6])
        _join(b, low, high, lambda i: b.gep(start, [ir.Constant(_i64, i)]), False)
        return context.get_dummy_value()

    return signature, generate


def _bytes_of(b: ir.IRBuilder, pointer: ir.Value, which: int) -> ir.Value:
    """Load the low (0) or high (1) bytes of 64 weights, in tile order."""
    halves = [
        _load(b, b.gep(pointer, [ir.Constant(_i64, i)]), ir.VectorType(_i8, 64)) for i in (0, 32)
    ]
    return _shuffle(b, halves[0], halves[1], [2 * column + which for column in _COLUMN])


def _exponents(b: ir.IRBuilder, high: ir.Value) -> ir.Value:
    return b.and_(high, _vector(_i8, [0x7F] * 64))


@intrinsic
def highest(typing: Any, weights: Any, at: Any) -> Any:
    """``(weights, at)``: the highest ``h`` of the 64 uint16 weights from ``weights[at]`` on.

    ``h`` is the high byte of a weight without the sign bit.
    """
    signature = types.uint8(weights, types.int64)

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = _at(context, b, signature.args[0], args[0], args[1])
        h = _exponents(b, _bytes_of(b, pointer, 1))
        name = "llvm.vector.reduce.umax.v64i8"
        reduce = b.module.globals.get(name)
        if reduce is None:
            reduce = ir.Function(b.module, ir.FunctionType(_i8, [h.type]), name)
        return b.call(reduce, [h])

    return signature, generate


def _encoder(*, zero: bool) -> Any:
    def step(
        typing: Any, weights: Any, at: Any, base: Any, words: Any, a: Any, b: Any, nibbles: Any
    ) -> Any:
        signature = types.uint64(
            weights, types.int64, types.uint8, words, types.int64, types.int64, types.int64
        )

        def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            kinds = signature.args
            pointer = _at(context, b, kinds[0], args[0], args[1])
            low, high = _bytes_of(b, pointer, 0), _bytes_of(b, pointer, 1)
            h, nothing = _exponents(b, high), _vector(_i8, [0] * 64)
            offset = b.sub(h, _splat(b, args[2], 64))
            outside = b.icmp_unsigned(">", offset, _vector(_i8, [7] * 64))
            if zero:
                is_zero = b.icmp_unsigned("==", h, nothing)
                lost = b.or_(outside, b.icmp_unsigned("==", offset, nothing))
                outside = b.and_(lost, b.not_(is_zero))
                offset = b.select(is_zero, nothing, offset)
            whole = ir.VectorType(_i32, 16)  # x86 has no shifts of single bytes
            sign = b.lshr(b.bitcast(high, whole), _vector(_i32, [4] * 16))
            nibble = b.or_(
                b.and_(b.bitcast(offset, whole), _vector(_i32, [0x07070707] * 16)),
                b.and_(sign, _vector(_i32, [0x08080808] * 16)),
            )
            lows = b.bitcast(low, whole)
            parts = [_shuffle(b, lows, lows, range(i, i + 8)) for i in (0, 8)]
            upper, lower = (_shuffle(b, nibble, nibble, range(i, i + 8)) for i in (0, 8))
            parts.append(b.or_(b.shl(upper, _vector(_i32, [4] * 8)), lower))
            for part, index in zip(parts, args[4:], strict=True):
                _store(b, part, _at(context, b, kinds[3], args[3], index), past_caches=False)
            return b.bitcast(outside, _i64)

        return signature, generate

    return intrinsic(step)


#: ``(weights, at, base, words, a, b, nibbles)``: encode the 64 uint16 weights from ``weights[at]``
#: on to the words at ``a``, ``b`` and ``nibbles``. Returns the mask of the weights that are out of
#: the range of ``base``: bit ``i`` for byte ``i`` of plane A, bit ``32 + i`` for byte ``i`` of B.
encode_plain = _encoder(zero=False)
#: As ``encode_plain``, but for the zero code.
encode_zero = _encoder(zero=True)


@intrinsic
def high_bytes(typing: Any, weights: Any, at: Any, words: Any, a: Any, b: Any) -> Any:
    """``(weights, at, words, a, b)``: write the high bytes of 64 weights uncoded."""
    signature = types.void(weights, types.int64, words, types.int64, types.int64)

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kinds = signature.args
        high = _bytes_of(b, _at(context, b, kinds[0], args[0], args[1]), 1)
        words = b.bitcast(high, ir.VectorType(_i32, 16))
        for first, index in zip((0, 8), args[3:], strict=True):
            part = _shuffle(b, words, words, range(first, first + 8))
            _store(b, part, _at(context, b, kinds[2], args[2], index), past_caches=False)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def lowest_bit(typing: Any, mask: Any) -> Any:
    """``(mask)``: the index of the lowest set bit of ``mask``, a nonzero uint64."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.cttz(args[0], ir.Constant(_i1, 1))

    return types.int64(types.uint64), generate


@intrinsic
def prefetch(typing: Any, words: Any, at: Any) -> Any:
    """``(words, at)``: prefetch ``words[at]``; ``at`` may be out of range."""
    signature = types.void(words, types.int64)

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = _at(context, b, signature.args[0], args[0], args[1])
        byte = b.bitcast(pointer, _i8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [byte.type, _i32, _i32, _i32])
        ask = b.module.declare_intrinsic("llvm.prefetch", [byte.type], kind)
        b.call(ask, [byte, *(ir.Constant(_i32, v) for v in (0, 3, 1))])  # read, keep, data
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def fence(typing: Any) -> Any:
    """Make writes that bypass the caches visible to other threads."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
