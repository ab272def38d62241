"""vLLM's options are validated against a list generated from its parser."""

from __future__ import annotations

import json
from operator import attrgetter
from typing import Any

import pytest

from fluxmoe.backends.vllm import features
from fluxmoe.backends.vllm.preflight import options
from fluxmoe.backends.vllm.server import launch
from tests.vllm.options import FILE, text

pytestmark = pytest.mark.vllm


def test_the_list_is_vllms() -> None:
    assert FILE.read_text() == text(), "run `python -m tests.vllm.options`"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"max-modle-len": 1},
            "vLLM has no such option; vllm.max-modle-len; did you mean 'max-mod",
        ),
        ({"no-enable-prefix-caching": False}, "write enable-prefix-caching: false"),
        ({"frobnicate": 1}, "see `vllm serve --help=all`"),
        ({"worker-cls": "x"}, "worker-cls is set by FluxMoE"),
        ({"enforce-eager": "yes"}, "it must be true or false, not 'yes'; vllm.enforce-eager"),
        ({"max-num-seqs": "many"}, "it must be a whole number, not 'many'"),
        ({"max-num-seqs": 1.5}, "it must be a whole number, not 1.5"),
        ({"gpu-memory-utilization": []}, "it must be a number, not []"),
        ({"dtype": "fp8"}, "it must be one of auto, bfloat16, float, float16, float32, half"),
        ({"max-model-len": True}, "it must be text, a number, a list or a map, not True"),
    ],
)
def test_b3_what_the_parser_would_refuse(given: dict[str, Any], says: str) -> None:
    (error,) = options.problems(given)
    assert says in str(error)
    (name,) = given
    if name not in options.OURS and given[name] != "yes":  # vLLM would take "yes" as the model
        assert not _parses(given)


@pytest.mark.parametrize(
    "given",
    [
        {"max-num-seqs": "8", "max-model-len": "4k", "dtype": "bfloat16"},
        {
            "enforce-eager": False,
            "no-enable-prefix-caching": True,
            "headless": False,
            "disable-log-stats": True,
        },
        {"compilation-config": {"mode": 0}, "compilation-config.mode": 0},
        {"served-model-name": ["a", "b"], "gpu-memory-utilization": 1, "host": None},
    ],
)
def test_values_that_the_parser_takes(given: dict[str, Any]) -> None:
    assert list(options.problems(given)) == []
    assert _parses(given)


def _parses(given: dict[str, Any]) -> bool:
    """Return True if vLLM's parser accepts the options."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = [word for key, value in given.items() for word in launch.option(key, value)]
    parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
    try:
        parser.parse_args(words)
    except (SystemExit, Exception):
        return False
    return True


def test_names_are_normalised() -> None:
    assert options.normalised({"max_model_len": 1}) == {"max-model-len": 1}


def test_the_list_has_types_only() -> None:
    data = json.loads(FILE.read_text())
    kinds = {kind for kind in data["options"].values() if isinstance(kind, str)}
    assert kinds == {"flag", "switch", "int", "float", "other"}


@pytest.mark.parametrize("feature", features.REFUSED, ids=lambda feature: feature.option)
def test_b3_a_refused_feature_is_an_option_and_a_setting(feature: features.Feature) -> None:
    from vllm.config import VllmConfig

    assert feature.option in options.known()
    attrgetter(feature.attribute)(VllmConfig() if "model" not in feature.attribute else Model())
    values = [None, False, 1] if options.known()[feature.option] != "int" else [None, 1]
    for value in values:
        assert list(features.refused_options({feature.option: value})) == []
    on = {"flag": True, "int": 2}.get(str(options.known()[feature.option]), {"method": "ngram"})
    (error,) = features.refused_options({feature.option: on})
    assert f"(--{feature.option}) yet; vllm.{feature.option}; turn it off" in str(error)


class Model:
    """A stand-in for a VllmConfig with a ``model_config``, which in vLLM needs a real model."""

    from vllm.config import ModelConfig as model_config
