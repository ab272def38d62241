import numpy as np
import pytest
from fluxmoe_zstd import Zstd

import fluxmoe
from fluxmoe import plugins
from fluxmoe.testing import check_codec


@pytest.mark.parametrize("level", [1, 3, 19])
def test_it_keeps_to_the_contract(level):
    check_codec(lambda: Zstd(level))


@pytest.fixture
def weights():
    values = (np.random.default_rng(0).standard_normal(1 << 16) * 0.02).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def test_weights_become_smaller(weights):
    assert len(Zstd().encode(weights)) < 0.72 * len(weights)


def test_noise_is_left_alone():
    assert len(Zstd().encode(np.random.default_rng(0).integers(0, 256, 4096).astype(np.uint8))) == 0


def test_a_flipped_bit_is_noticed_anywhere(weights):
    codec, out = Zstd(), np.zeros_like(weights)
    coded = codec.encode(weights)
    for place in [0, 8, 16, 24, len(coded) // 2, len(coded) - 1]:
        damaged = coded.copy()
        damaged[place] ^= 4
        with pytest.raises(fluxmoe.CodecError):
            codec.decode(damaged, out)


def test_it_is_known_by_its_name_and_takes_a_level():
    registry = plugins.load(["fluxmoe_zstd"])
    assert isinstance(registry.create("codec", {"kind": "zstd", "level": 9}), Zstd)
