"""Errors: the code in every text, several problems in one, and suggested names (B4, B6)."""

from __future__ import annotations

import pickle
import traceback

import pytest

from fluxmoe import errors
from fluxmoe.cli.shared import output
from fluxmoe.errors import CheckpointError, ConfigError, UnknownPolicyError, meant, together

CLASSES = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, errors.FluxMoEError)
]


def made(kind: type[errors.FluxMoEError]) -> errors.FluxMoEError:
    if kind is UnknownPolicyError:
        return UnknownPolicyError("eviction", "lruu", ["lru", "lfu"])
    if kind is errors.UnknownCodecError:
        return errors.UnknownCodecError("zip", ["zipnn"])
    return kind("it is wrong", where="there", fix="mend it")


@pytest.mark.parametrize("kind", CLASSES)
def test_b4_the_code_is_in_text_tracebacks_and_copies(kind):
    error = made(kind)
    assert str(error).startswith(f"{kind.code}: {error.what}; ")
    assert f"{kind.code}: {error.what}" in "".join(traceback.format_exception_only(error))
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.where, copy.fix) == (
        kind, str(error), error.where, error.fix
    )  # fmt: skip


def test_b4_the_command_line_prints_the_code_once(capsys):
    output.print_error(ConfigError("it is wrong", where="there", fix="mend it"))
    assert capsys.readouterr().err == "error[FM101]: it is wrong; there; mend it\n"


def test_b6_several_problems_travel_together(capsys):
    one = ConfigError("a", where="x")
    both = together([one, together([CheckpointError("b"), ConfigError("c", fix="d")])])
    assert both is one and [error.what for error in both.problems()] == ["a", "b", "c"]
    for error in both, pickle.loads(pickle.dumps(both)):
        assert str(error) == "FM101: a; x\nFM406: b\nFM101: c; d"
    output.print_error(both)
    assert capsys.readouterr().err == "error[FM101]: a; x\nerror[FM406]: b\nerror[FM101]: c; d\n"
    assert together(both.problems()).problems() == both.problems()
    assert together([ConfigError("alone")]).problems()[0].others == ()


def test_a_message_is_one_line_whatever_names_it_has():
    error = errors.CheckpointError("no\nfolder", where="a\r\nb\x1b[2J", fix="c\td")
    assert error.text == "no\\nfolder; a\\r\\nb\\x1b[2J; c\\td"
    log = errors.EngineError("it ended", where="the log:\nline 1\nline 2")
    assert len(str(log).splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [("lruu", "did you mean 'lru'?"), ("lfu_", "did you mean 'lfu'?"), ("nonsense", ""), ("", ""),
     (3, ""), (None, "")],
)  # fmt: skip
def test_b6_names_that_were_meant(name, words):
    assert meant(name, {"lru", "lfu", "belady"}) == words


def test_b6_unknown_names_suggest_before_they_list():
    assert made(UnknownPolicyError).fix == "did you mean 'lru'?; known eviction policies: lfu, lru"
    assert made(errors.UnknownCodecError).fix == "did you mean 'zipnn'?; known codecs: zipnn"
    assert UnknownPolicyError("eviction", "x", ["lru"]).fix == "known eviction policies: lru"
