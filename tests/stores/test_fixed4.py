"""``fixed4`` follows docs/concepts/lossless-code.md byte for byte, and detects damage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fluxmoe.errors import CodecError
from fluxmoe.stores.codec.fixed4 import Fixed4, inspect
from tests.stores import reference
from tests.stores.weights import bf16, matrices

ALL = np.arange(65536, dtype=np.uint16)


def as_bytes(weights: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weights).view(np.uint8).reshape(-1)


def guarded(nbytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Allocate ``nbytes`` bytes inside a larger array that is filled with one value."""
    around = np.full(nbytes + 256, 0xA5, np.uint8)
    return around[128 : 128 + nbytes], around


def decoded(block: np.ndarray, nbytes: int) -> np.ndarray:
    out, around = guarded(nbytes)
    Fixed4().decode(block, out)
    assert (around[:128] == 0xA5).all() and (around[128 + nbytes :] == 0xA5).all()
    return out


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("cols", [64, 128, 192])
def test_what_goes_in_comes_out(name: str, cols: int) -> None:
    raw = as_bytes(matrices()[name])
    block = Fixed4(cols).encode(raw)
    assert len(block) < len(raw)
    if len(block):
        assert (decoded(block, len(raw)) == raw).all()


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize(("rows", "cols"), [(70, 192), (64, 128), (3, 320), (130, 64)])
def test_blocks_are_those_of_the_reference(name: str, rows: int, cols: int) -> None:
    weights = matrices(rows, cols)[name]
    raw = np.concatenate([as_bytes(weights), np.frombuffer(b"end", np.uint8)])
    expected = reference.encode(weights, b"end")
    got, tail = reference.decode(expected)
    assert (got == weights).all() and tail == b"end"
    block = Fixed4(cols).encode(raw)
    if len(expected) < len(raw):
        assert block.tobytes() == expected.tobytes()
    else:
        assert not len(block)


@pytest.mark.parametrize("order", ["sorted", "shuffled among weights"])
def test_all_patterns_survive(order: str) -> None:
    if order == "sorted":
        raw = as_bytes(ALL)
    else:
        rng = np.random.default_rng(1)
        weights = bf16(rng.standard_normal(64 * 65536) * 0.02)
        weights[::64] = rng.permutation(ALL)  # one in each half of a segment
        raw = as_bytes(weights)
    block = Fixed4().encode(raw)
    assert 0 < len(block) < len(raw)
    assert (decoded(block, len(raw)) == raw).all()


@pytest.mark.parametrize(
    "nbytes", [0, 1, 2, 127, 255, 256, 257, 300, 511, 1024, 4096, 4097, 99_999]
)
def test_every_length_is_coded_or_left_alone(nbytes: int) -> None:
    rng = np.random.default_rng(nbytes)
    raw = np.append(as_bytes(bf16(rng.standard_normal(nbytes // 2))), np.zeros(1, np.uint8))[
        :nbytes
    ]
    block = Fixed4().encode(raw)
    assert len(block) < max(1, nbytes)
    assert len(block) > 0 or nbytes < 1000
    if len(block):
        assert (decoded(block, nbytes) == raw).all()


@given(
    hnp.arrays(np.uint16, st.integers(0, 3000), elements=st.integers(0x3E00, 0x4000)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 65535)), max_size=40),
    st.sampled_from([64, 128, 192, 256]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_weights_survive(weights, strange, cols, odd) -> None:
    for place, pattern in strange:
        if len(weights):
            weights[int(place * len(weights))] = pattern
    raw = np.append(as_bytes(weights), np.full(int(odd), 7, np.uint8))
    block = Fixed4(cols).encode(raw)
    assert len(block) < max(1, len(raw))
    if len(block):
        assert (decoded(block, len(raw)) == raw).all()
        rows = len(weights) // cols
        head = weights[: rows * cols].reshape(rows, cols)
        assert block.tobytes() == reference.encode(head, raw[2 * head.size :].tobytes()).tobytes()


def test_large_parts_go_past_the_caches_and_are_the_same() -> None:
    rng = np.random.default_rng(3)
    weights = bf16(rng.standard_normal((1025, 640)) * 0.02)
    weights[::100, ::30] = 0
    raw = as_bytes(weights)
    around = np.zeros(len(raw) + 64, np.uint8)
    lined_up = -around.ctypes.data % 64
    for shift in (0, 1, 2, 32):
        out = around[(lined_up + shift) % 64 :][: len(raw)]
        Fixed4().decode(Fixed4(640).encode(raw), out)
        assert (out == raw).all()


def test_arrays_may_lie_anywhere() -> None:
    raw = as_bytes(matrices()["scattered patterns"])
    at_odd = np.zeros(len(raw) + 1, np.uint8)[1:]
    at_odd[:] = raw
    at_odd.setflags(write=False)
    block = Fixed4().encode(at_odd)
    assert block.tobytes() == Fixed4().encode(raw).tobytes()
    moved = np.zeros(len(block) + 1, np.uint8)[1:]
    moved[:] = block
    out = np.zeros(len(raw) + 1, np.uint8)[1:]
    Fixed4().decode(moved, out)
    assert (out == raw).all()


def test_ratio_of_normal_weights_and_no_raw_segments_for_single_zeros_or_outliers() -> None:
    rng = np.random.default_rng(4)
    raw = as_bytes(bf16(rng.standard_normal(1 << 20) * 0.02))
    assert len(raw) / len(Fixed4().encode(raw)) >= 1.30
    for name in ("pruned", "a column of infinities"):
        block = Fixed4().encode(as_bytes(matrices()[name]))
        assert inspect(block).layout.raw == 0
    assert inspect(block).escapes > 0


def test_what_cannot_be_compressed_is_left_alone() -> None:
    rng = np.random.default_rng(5)
    assert not len(Fixed4().encode(rng.integers(0, 256, 1 << 18).astype(np.uint8)))


@pytest.mark.parametrize("cols", [0, -64, 100])
def test_columns_must_fit_the_tiles(cols: int) -> None:
    with pytest.raises(CodecError, match=rf"positive multiple of 64, not {cols}"):
        Fixed4(cols)


# --- damage --------------------------------------------------------------------------------------


def damaged_by(block: np.ndarray, raw: np.ndarray) -> bool:
    """Return True if a modified block is rejected and nothing is written outside the output."""
    out, around = guarded(len(raw))
    try:
        Fixed4().decode(block, out)
    except CodecError as error:
        assert error.code == "FM305"
        return (around[:128] == 0xA5).all() and (around[128 + len(raw) :] == 0xA5).all()
    return False


def small() -> np.ndarray:
    weights = matrices(5, 192)["scattered patterns"]
    weights[2] = matrices(5, 192)["normal"][2]
    weights[2, :64:9] = 0
    weights[3, :64] = ALL[1000:17384:256]
    return np.append(as_bytes(weights), np.zeros(3, np.uint8))


def test_every_single_bit_that_flips_is_noticed() -> None:
    raw = small()
    block = Fixed4(192).encode(raw)
    facts = inspect(block)
    assert facts.layout.raw and facts.zero_coded and facts.escapes and facts.layout.tail
    for bit in range(8 * len(block)):
        flipped = block.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        assert damaged_by(flipped, raw), f"bit {bit} of {8 * len(block)}"


def test_two_bits_that_flip_are_noticed() -> None:
    raw = small()
    block = Fixed4(192).encode(raw)
    rng = np.random.default_rng(6)
    for pair in rng.integers(0, 8 * len(block), (3000, 2)):
        flipped = block.copy()
        for bit in pair:
            flipped[bit // 8] ^= 1 << bit % 8
        assert damaged_by(flipped, raw) or pair[0] == pair[1]


def test_a_block_that_is_cut_or_longer_is_refused() -> None:
    raw = small()
    block = Fixed4(192).encode(raw)
    for size in range(0, len(block), 7):
        assert damaged_by(block[:size], raw)
    assert damaged_by(np.append(block, np.zeros(16, np.uint8)), raw)
    assert damaged_by(block[16:], raw)


@given(st.binary(min_size=64, max_size=600), st.booleans())
@settings(max_examples=300, deadline=None)
def test_anything_else_is_refused(noise: bytes, with_trailer: bool) -> None:
    raw = small()
    block = np.frombuffer(noise[: len(noise) // 16 * 16], np.uint8).copy()
    if with_trailer:
        block[-64:] = Fixed4(192).encode(raw)[-64:]
    assert damaged_by(block, raw)


def test_a_block_that_lies_with_a_right_checksum_cannot_lead_astray() -> None:
    raw = small()
    block = Fixed4(192).encode(raw)
    layout = inspect(block).layout
    headers = block[layout.headers : layout.headers + 4 * layout.rows * 2].view("<u4")
    for header in (0xFFFFFFFF, 0x80000000 | layout.raw, 0x7FFFFFFF, 0x30000000 | 0xFFFFFF7F):
        before = headers.copy()
        headers[4] = header
        block[-8:].view("<u8")[0] = reference.checksum(block[:-8])
        out, around = guarded(len(raw))
        if header >> 31:
            with pytest.raises(CodecError, match="names a missing raw segment"):
                Fixed4().decode(block, out)
        else:
            Fixed4().decode(block, out)
        assert (around[:128] == 0xA5).all() and (around[128 + len(raw) :] == 0xA5).all()
        headers[:] = before


def test_errors_say_what_is_wrong() -> None:
    raw = small()
    block = Fixed4(192).encode(raw)
    with pytest.raises(CodecError, match=f"the block holds {len(raw)} bytes, not 5"):
        Fixed4().decode(block, np.zeros(5, np.uint8))
    newer = block.copy()
    newer[len(newer) - 60] = 9
    with pytest.raises(CodecError, match="the block has version 9; supported: 1"):
        inspect(newer)
