"""Codecs are registered by their own hook; errors contain the name of the codec."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest

import fluxmoe
from fluxmoe import errors, plugins
from fluxmoe.stores.codec.fixed4 import Fixed4

PLUGIN = """
import numpy as np
import pydantic
import fluxmoe

class Options(pydantic.BaseModel):
    key: int = 1

class Xor(fluxmoe.Codec):
    def __init__(self, key=1):
        self.key = key
    def encode(self, raw):
        return raw[:-1] ^ self.key
    def decode(self, coded, out):
        out[:-1] = coded ^ self.key

@fluxmoe.hookimpl
def fluxmoe_register_codecs(register):
    register("xor", Xor, Options)
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "plugin.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_the_built_in_codecs_are_known_and_are_no_policies() -> None:
    registry = plugins.load()
    assert registry.names("codec") == ["fixed4", "none", "zipnn"]
    assert isinstance(registry.create("codec", "fixed4"), Fixed4)
    assert all(policy.kind != "codec" for policy in registry)
    assert registry.get("codec", "fixed4").summary.startswith("Fixed-width code")


def test_a_plugin_may_bring_a_codec_and_its_options(tmp_path: Path) -> None:
    registry = plugins.load([write(tmp_path, PLUGIN)])
    codec = registry.create("codec", {"kind": "xor", "key": 5})
    assert isinstance(codec, fluxmoe.Codec) and codec.key == 5
    assert codec.encode(np.arange(4, dtype=np.uint8)).tolist() == [5, 4, 7]


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("xor", errors.UnknownCodecError, "unknown codec 'xor'; known codecs: fixed4, none, zipnn"),
        (
            {"kind": "fixed4", "cols": 64},
            errors.ConfigError,
            "unknown option 'cols'",
        ),
        ({"kind": "zipnn", "dtype": "int3"}, errors.ConfigError, "dtype: .* not 'int3'"),
        ({"dtype": 1}, errors.ConfigError, "no codec in"),
    ],
)
def test_a_codec_that_cannot_be_had_is_a_clear_error(spec, kind, message) -> None:
    with pytest.raises(kind, match=message):
        plugins.load().create("codec", spec)


def test_zipnn_without_its_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zipnn", None)
    with pytest.raises(errors.MissingDependencyError, match=r"pip install 'fluxmoe\[zipnn\]'"):
        plugins.load().create("codec", "zipnn")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PLUGIN.replace("fluxmoe.Codec", ""),
            "'xor' is not a codec class",
        ),
        (PLUGIN.replace('"xor"', '"fixed4"'), "codec 'fixed4' is already registered by fluxmoe"),
        (PLUGIN.replace('"xor"', "7"), "not a valid name: 7"),
        (PLUGIN.replace('"xor"', "1 / 0"), "fluxmoe_register_codecs raised ZeroDivisionError"),
        (PLUGIN.replace("register_codecs", "register_policies"), "'xor' is not a policy class"),
    ],
)
def test_a_plugin_with_a_wrong_codec_is_refused_by_name(tmp_path, text, message) -> None:
    path = write(tmp_path, text)
    with pytest.raises(errors.PluginLoadError, match=message) as info:
        plugins.load([path])
    assert info.value.where == f"plugin {path}"


def test_a_codec_that_cannot_be_made_is_the_plugins_fault(tmp_path: Path) -> None:
    path = write(tmp_path, PLUGIN.replace("self.key = key", "raise RuntimeError('no key')"))
    with pytest.raises(errors.PluginLoadError, match=r"codec 'xor' cannot be created.*no key"):
        plugins.load([path]).create("codec", "xor")
