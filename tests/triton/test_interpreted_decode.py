"""Pages are decoded into slots bit for bit, and each flipped bit is detected or irrelevant."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxmoe.cuda.kernels.pages import CompressedPages, RawSlots, decode_to_slots
from fluxmoe.errors import UnsupportedError
from fluxmoe.stores.codec.fixed4 import Layout
from tests.stores import reference
from tests.triton.weights import bits, compressed, kinds, patterns, raw_slots, weights

POISON = 0x7FFF


def decoded(source: CompressedPages, pages=None, slots=None, count=None, room=None) -> torch.Tensor:
    """Decode to ``[slots, N, K]`` bit patterns; unused slots contain poison."""
    pages = list(range(len(source.offsets))) if pages is None else pages
    slots = pages if slots is None else slots
    shape = (room or len(pages), source.rows, source.cols)
    target = RawSlots(torch.full(shape, POISON, dtype=torch.int16).view(torch.bfloat16))
    decode_to_slots(
        source,
        torch.tensor(pages, dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor([len(pages) if count is None else count], dtype=torch.int32),
        target,
    )
    return bits(target.weights)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("shape", [(1, 64, 1024), (2, 100, 192), (1, 3, 64)], ids=str)
def test_decoded_pages_are_what_was_encoded(kind, shape):
    w = dict(weights(shape))[kind].astype(np.uint16)
    assert torch.equal(decoded(compressed(w)), bits(raw_slots(w).weights))


def test_all_patterns_are_in_the_tests():
    for name, w in weights((1, 64, 1024)):
        if "patterns" in name:
            assert len(np.unique(w)) == 65536


def test_only_what_is_counted_is_decoded_and_only_into_its_slot():
    w = np.stack([patterns(np.full((64, 64), page + 1)) for page in range(4)])
    got = decoded(compressed(w), pages=[3, 1, 2], slots=[0, 4, 2], count=2, room=5)
    want = np.full((5, 64, 64), POISON, np.uint16)
    want[0], want[4] = w[3], w[1]
    assert np.array_equal(got.numpy().view(np.uint16), want)


def test_slots_of_another_size_are_refused():
    source = compressed(next(weights((1, 64, 128)))[1])
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="do not fit"):
        decode_to_slots(source, one, one, one, RawSlots(torch.zeros(1, 64, 64).bfloat16()))


@pytest.mark.parametrize("kind", ["normal", "strays", "strays among zeros", "full of escapes"])
def test_a_flipped_bit_is_seen_by_comparing_slots(kind):
    """Flip one bit of each block; the kernel must decode the block as the reference does.

    In plain headers, a bit of the base is flipped. Other header bits may be unused (the place of an
    absent escape) or make the kernel read outside the block; for this reason blocks have checksums,
    which are verified before copying to a device.
    """
    w = dict(weights((1, 64, 192)))[kind][0].astype(np.uint16)
    block = reference.encode(w)
    place = Layout(*w.shape)
    headers = block[place.headers : place.flags].view("<u4").reshape(2, 64)
    rng = np.random.default_rng(5)
    damaged, must_be_seen = [], []
    while len(damaged) < 40:
        byte, bit = int(rng.integers(place.pool + 128)), int(rng.integers(8))
        if place.headers <= byte < place.flags:
            header = headers.flat[(byte - place.headers) // 4]
            if header >> 31 or byte % 4 or bit == 7:
                continue
            seen = True
        elif byte < place.headers:
            column_tile, rest = divmod(byte, 6144)
            plane, row = divmod(rest, 2048)[0], rest % 2048 // 32
            seen = plane < 2 or not headers[column_tile // 2, row] >> 31
        elif place.flags <= byte < place.pool or byte >= len(block) - 64:
            continue  # flags are hints; only readers on the host use the trailer
        else:
            seen = False  # the second half of a row's last segment may not exist
        copy = block.copy()
        copy[byte] ^= 1 << bit
        copy[-8:].view("<u8")[0] = reference.checksum(copy[:-8])
        damaged.append(copy)
        must_be_seen.append(seen)

    pitch = -(-len(block) // 128) * 128
    data = np.zeros((len(damaged), pitch), np.uint8)
    data[:, : len(block)] = damaged
    offsets = torch.arange(len(damaged), dtype=torch.int32) * (pitch // 128)
    source = CompressedPages(torch.from_numpy(data.reshape(-1)), offsets, *w.shape)
    got = decoded(source).numpy().view(np.uint16)
    for page, copy, seen in zip(got, damaged, must_be_seen, strict=True):
        assert np.array_equal(page, reference.decode(copy)[0])
        assert not seen or not np.array_equal(page, w)
    assert sum(must_be_seen) > 20
