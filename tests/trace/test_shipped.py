"""The shipped traces match their README."""

import json
from pathlib import Path

import pytest

import fluxmoe
from fluxmoe.errors import ConfigError
from fluxmoe.trace import shipped
from fluxmoe.trace.statistics import describe

ASSETS = Path(fluxmoe.__file__).parent / "demo" / "assets"


@pytest.fixture(scope="module")
def found():
    return {name: describe(shipped.path(name)) for name in shipped.NAMES}


def test_they_are_of_the_shipped_model(found):
    [file] = ASSETS.glob("*/config.json")
    config = json.loads(file.read_text())
    for name, one in found.items():
        meta = one.meta
        assert meta.model == file.parent.name, name
        assert (meta.num_layers, meta.experts_per_layer, meta.top_k) == (
            config["num_hidden_layers"], config["num_local_experts"], config["num_experts_per_tok"],
        )  # fmt: skip
        weights = 3 * config["hidden_size"] * config["moe_intermediate_size"]
        assert (meta.page_bytes, meta.source) == (2 * weights, "torch")
        assert one.columns == ("predicted",)


def test_decode_is_decode_at_the_batch_that_the_name_says(found):
    for name, requests, steps in (("decode-1", 8, 1992), ("decode-8", 24, 747),
                                  ("decode-64", 64, 199)):  # fmt: skip
        one, batch = found[name], int(name.split("-")[1])
        assert (one.prefill_events, one.requests, one.steps) == (0, requests, steps)
        assert one.rows == steps * batch * one.meta.num_layers
        assert [(u.tokens_to, u.events) for u in one.unions] == [(batch, one.events)]


def test_prefill_is_prefill_of_all_lengths(found):
    one = found["prefill"]
    assert one.prefill_events == one.events == 72 * one.meta.num_layers
    assert one.rows == 12 * (8 + 16 + 32 + 64 + 128 + 192) * one.meta.num_layers


def test_they_are_real(found):
    """The traces have properties of a trained model: balanced experts and predictable routing.

    Overlap is not checked: consecutive tokens, which are single bytes, have at most twice as many
    experts in common as by chance.
    """
    for name, one in found.items():
        by_chance = one.meta.top_k / one.meta.experts_per_layer
        assert all(layer.experts_used > 0.9 * one.meta.experts_per_layer for layer in one.layers)
        assert all(layer.entropy > 0.9 for layer in one.layers)
        assert all(layer.predicted > 6 * by_chance for layer in one.layers[1:]), name


def test_they_are_small():
    assert sum(shipped.path(name).stat().st_size for name in shipped.NAMES) < 4 << 20


def test_there_are_no_others():
    assert {path.stem for path in shipped.FOLDER.glob("*.parquet")} == set(shipped.NAMES)
    with pytest.raises(ConfigError, match=r"unknown trace 'decode'.*decode-1, decode-8"):
        shipped.path("decode")
