"""Sizes (B1): one table of accepted and rejected values, tested at every interface."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from itertools import count

import numpy as np
import pytest
import yaml
from hypothesis import given as given_
from hypothesis import strategies as st

from fluxmoe import config, sizes
from fluxmoe.backends.torch.settings import given, settings
from fluxmoe.cli import main
from fluxmoe.errors import ConfigError
from fluxmoe.findings import Findings
from fluxmoe.sim.capacity import pages_of
from fluxmoe.testing import checkpoints
from fluxmoe.trace import TraceMeta

TAKEN = [
    ("24GiB", 24 << 30), ("24 GiB", 24 << 30), ("24Gi", 24 << 30), ("24 gi", 24 << 30),
    ("24gib", 24 << 30), ("512Mi", 512 << 20), ("1Ki", 1024), ("2KiB", 2048), ("3MiB", 3 << 20),
    ("1TiB", 1 << 40), ("1PiB", 1 << 50), ("7EiB", 7 << 60), ("1.5GB", 1_500_000_000),
    ("1.5 GB", 1_500_000_000), (".5KB", 500), ("1kb", 1000), ("1k", 1000), ("2M", 2_000_000),
    ("24G", 24 * 10**9), ("8192B", 8192), ("8192 b", 8192), ("8192", 8192), (" 8192 ", 8192),
    ("\t1GiB\n", 1 << 30), ("007", 7), ("8kbit", 1000), ("1Kibit", 128), ("16bit", 2),
    ("24.7GiB", 26521423052), ("0.3KiB", 307), ("8.0", 8), ("1.1GB", 1_100_000_000),
    (8192, 8192), (1e9, 10**9), (2**63 - 1, 2**63 - 1), (np.int64(4096), 4096),
]  # fmt: skip

REFUSED = [
    "50%", "50 %", "24,5MiB", "24.5.1MiB", "24MiB!", "24MiB 5GiB", "24 MiB per worker", "2GiB foo",
    "8MiB please", "24GiBs", "24Gib/s", "24 Giga", "GiB", "3 ponies", "lots", "", " ", ".", "24.",
    "24.GiB", "-1", "-1GiB", "+1GiB", "1e9", "1_000", "0x10", "1/2GiB", "24i", "24iB", "24KK",
    "1.5", "1.5B", "0.5 b", "3bit", "nan", "inf", "∞GiB", "٢GiB", "2\x00GiB", "\ud800",
    "8EiB", "9EiB", str(2**63), "9" * 5000, "1GiB\n1GiB", "auto ",
    True, False, -1, 1.5, float("nan"), float("inf"), -1e9, 2**63, 10**5000, [], {}, ["1GiB"],
]  # fmt: skip


def ask(*words: object) -> tuple[int, str]:
    """Run a command; return exit code and output."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as exit_:
        main(list(map(str, words)))
    return int(exit_.value.code or 0), out.getvalue()


def said_by(call, value) -> str:
    with pytest.raises((ConfigError, ValueError)) as caught:
        call(value)
    return str(caught.value)


def loaded(memory):
    found = Findings()
    config = settings("load", memory, found)
    found.require()
    return config


DOORS = {
    "parse": sizes.parse,
    "the command line": lambda value: config.size(value, where="--memory"),
    "the budget": lambda value: config.parse({"memory": {"budget": value}}, where="").memory.budget,
    "a bound": lambda value: (
        config.parse(
            {"memory": {"budget": "8EB", "experts": {"target": value}}}, where=""
        ).memory.experts.target
    ),
    "the frame": lambda value: (
        config.parse({"memory": {"budget": "8EB", "frame": value}}, where="").memory.frame
    ),
    "a store's limit": lambda value: (
        config.parse(
            {"memory": {"budget": 1}, "stores": [{"kind": "host", "limit": value}]}, where=""
        )
        .stores[0]
        .limit
    ),
    "a limit by hand": lambda value: config.parse_limits({"kv": {"max": value}}, where="").kv.max,
    "load and page": lambda value: given(loaded(value), "load"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("value", "size"), TAKEN, ids=count())
def test_taken(door, value, size):
    assert DOORS[door](value) == size


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("value", REFUSED, ids=count())
def test_refused(door, value):
    said = said_by(DOORS[door], value)
    assert "not a valid size: " in said and sizes.VALID in said
    assert len(said) < 400 and said.isprintable()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("50%", "not a valid size: '50%', a percentage (valid: bytes, or a number with a unit "
                "such as 24GiB, 512MiB, 24Gi)"),
        ("1.5", "'1.5', a fraction of a byte (valid"),
        ("9EiB", "'9EiB', which exceeds 8EiB (valid"),
        ("24,5MiB", "'24,5MiB' (valid"),
        (True, "True (valid"),
    ],
)  # fmt: skip
def test_what_is_said(value, said):
    assert said in said_by(sizes.parse, value)


@pytest.mark.parametrize("zero", [0, "0", "0GiB", 0.0, "0.0001KiB"])
def test_nothing(zero):
    """A bound may be zero; a budget may not."""
    assert sizes.parse(zero) == 0
    assert DOORS["a bound"](zero) == 0
    for door in ("the command line", "the budget", "load and page"):
        assert "must be greater than 0" in said_by(DOORS[door], zero)


@pytest.mark.parametrize(
    "door", [door for door in DOORS if door not in ("parse", "the command line")]
)
def test_what_is_left_out(door):
    take = DOORS[door]
    if door == "load and page":
        assert "auto is not supported" in said_by(take, "auto")
    elif door != "the budget":
        assert take("auto") is None and take(None) is None
    else:
        assert "not a valid size: None" in said_by(take, None)


META = TraceMeta("", 4, 25, 1, 1024, "")


@pytest.mark.parametrize(
    ("capacity", "pages"),
    [(96, 96), ("96", 96), (" 96 ", 96), ("25%", 25), ("25 %", 25), ("12.5%", 12), (".5%", 0),
     ("29%", 29), ("0%", 0), ("100%", 100), ("64KiB", 64), ("64Ki", 64), ("1.5 KiB", 1), (0, 0)],
)  # fmt: skip
def test_capacities(capacity, pages):
    assert pages_of(capacity, META) == pages


@pytest.mark.parametrize(
    "capacity",
    ["2GiB foo", "24,5MiB", "24MiB!", "25%%", "25% of all", "-5%", "-5", -5, "1/2%", "1e2%", "nan%",
     "1/0%", "1e999999999%", "%", "", "1.5", "1e3", "lots", "GiB", 1.5, True, None, 10**5000,
     "9" * 5000, "٢", "9EiB"],
    ids=count(),
)  # fmt: skip
def test_capacities_that_are_none(capacity):
    said = said_by(lambda value: pages_of(value, META), capacity)
    assert said.count("not a valid capacity: ") and "; --capacity; write pages" in said
    assert len(said) < 400 and said.isprintable()


def test_more_than_all_pages():
    said = said_by(lambda value: pages_of(value, META), "100.1%")
    assert said == "FM101: 100.1% is more than all pages; --capacity; write at most 100%"


@pytest.mark.parametrize("text", ["50%", "24,5MiB", "24MiB!", "24MiB 5GiB", "24 MiB per worker"])
def test_commands(text, tmp_path, monkeypatch):
    bad, path = f"not a valid size: {text!r}", tmp_path / "fluxmoe.yaml"
    for memory in ({"budget": text}, {"budget": "1GiB", "experts": {"target": text}}):
        path.write_text(yaml.safe_dump({"memory": memory}))
        code, said = ask("config", "check", path)
        assert code == 2 and "error[FM101]: memory." in said and bad in said
    for option in ("--budget", "--kv-min", "--kv-max", "--experts-min", "--experts-max"):
        code, said = ask("limit", option, text)
        assert code == 2 and bad in said
    model = checkpoints.write(tmp_path / "model", "mixtral", num_hidden_layers=1)
    for command in ("plan", "generate"):
        more = ["--prompt", "x"] if command == "generate" else []
        code, said = ask(command, model, "--memory", text, *more)
        assert code == 2 and bad in said and said.count("\n") == 1


def test_the_schema_takes_and_refuses_the_same():
    budget = config.json_schema()["$defs"]["Memory"]["properties"]["budget"]["anyOf"]
    pattern = next(one["pattern"] for one in budget if "pattern" in one)
    for text, _ in TAKEN:
        assert not isinstance(text, str) or re.search(pattern, text)
    too_large_or_split = {"1.5", "1.5B", "0.5 b", "3bit", "8EiB", "9EiB", str(2**63), "9" * 5000}
    for text in REFUSED:
        if isinstance(text, str) and text not in too_large_or_split:
            assert not re.search(pattern, text), text


def test_http():
    """A server rejects invalid sizes before calling the workers."""
    starlette = pytest.importorskip("starlette.applications")
    client = pytest.importorskip("starlette.testclient")
    control = pytest.importorskip("fluxmoe.backends.vllm.server.control")
    app = starlette.Starlette()
    app.add_route(control.LIMITS_PATH, control.limits, methods=["POST"])
    ask = client.TestClient(app)
    for value in ("50%", "24MiB!", "\ud800", -1, 1.5, 10**400):
        answer = ask.post(control.LIMITS_PATH, content=json.dumps({"kv": {"max": value}}))
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "FM101"
        assert "kv.max: not a valid size" in error["message"]
    for text in (
        '{"kv": {"max": NaN}}',
        '{"kv": {"max": Infinity}}',
        '{"\\ud800": 1}',
        "[" * 10**5,
    ):
        assert ask.post(control.LIMITS_PATH, content=text).status_code == 400


@pytest.mark.parametrize(
    ("size", "shown", "exact", "at_least"),
    [
        (0, "0 B", 0, 0), (1, "1 B", 1, 1), (1023, "1023 B", 1023, 1023),
        (1024, "1.0 KiB", "1KiB", "1KiB"), (1536, "1.5 KiB", 1536, 1536),
        (3 << 20, "3.0 MiB", "3MiB", "3MiB"), (12586000, "12.0 MiB", 12586000, "12.01MiB"),
        (24 << 30, "24.0 GiB", "24GiB", "24GiB"),
        ((24 << 30) + 1, "24.0 GiB", 25769803777, "24.01GiB"),
        (3 << 29, "1.5 GiB", "1536MiB", "1536MiB"), (1 << 40, "1.0 TiB", "1TiB", "1TiB"),
        (5 << 50, "5120.0 TiB", "5120TiB", "5120TiB"),
    ],
)  # fmt: skip
def test_b4_printed(size, shown, exact, at_least):
    assert (sizes.shown(size), sizes.exact(size), sizes.at_least(size)) == (shown, exact, at_least)


@given_(st.integers(0, 2**62))
def test_b4_what_is_printed_can_be_read_again(size):
    assert sizes.parse(sizes.exact(size)) == size
    assert size <= sizes.parse(sizes.at_least(size)) <= size * 1.011 + 1


@given_(st.integers(0, 2**50), st.integers(1, 2**30))
def test_b4_sizes_that_differ_look_different(size, more):
    one, other = sizes.apart(size, size + more)
    assert one != other
