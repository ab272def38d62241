"""Tables (C1): complete at 80 columns, with constant columns stated once, and as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from fluxmoe.cli.shared import table
from fluxmoe.demo.model import SHIPPED
from fluxmoe.trace import shipped
from tests.commandline import here, succeeds, terminal
from tests.docs.pages import PAGES
from tests.plugins.rig import write
from tests.stores.test_tiers import filled, in_file

TRACE = shipped.path("decode-1")
RUNS = "simulate", TRACE, "--policy", "lru,next-use", "--capacity", "10%,50%"
PLAN = "plan", SHIPPED, "--memory", "14MiB", "--context", "128", "--hardware", "laptop-nvme"
SIMULATED = "capacity_pages", "hit_rate", "misses", "prefetch_hits", "evictions", "released"
POINT = "expert_bytes", "resident_share", "kv_bytes", "requests", "step_ms", "tokens_per_s"


def values(rows, *fields):
    return [row[field] for row in rows for field in fields]


#: Command → the numbers in the command's JSON that its tables show.
COMMANDS = {
    "simulate": (RUNS, lambda data: values(data, *SIMULATED, "bytes_demand", "bytes_prefetch")),
    "simulate, timed": (
        (*RUNS, "--prefetch", "none,gate", "--hardware", "h100-pcie5"),
        lambda data: values(data, *SIMULATED, "bytes_prefetch", "step_ms_mean", "stall_share",
                            "tokens_per_s"),
    ),
    "trace info": (
        ("trace", "info", TRACE),
        lambda data: [
            *values(data["layers"], "gini", "entropy", "top_share", "experts_used", "overlap"),
            *values(data["working_sets"], "steps", "mean_pages", "max_pages"),
            *values(data["unions"], "tokens_from", "events", "mean_experts", "uniform"),
        ],
    ),
    "codec": (
        ("codec",),
        lambda data: values([*data["layers"], data["total"]], "raw_bytes", "coded_bytes", "ratio"),
    ),
    "plan": (PLAN, lambda data: values([data["recommended"], data["automatic"]], *POINT)),
    "plugin check": (
        ("plugin", "check", "PLUGIN"),
        lambda data: [n for of in data[0]["misses"].values() for n in of.values()],
    ),
    "policies": (("policies",), lambda data: []),
    "cache list": (("cache", "list", "PAGES"), lambda data: values(data, "held", "pages", "bytes")),
    "doctor": (("doctor", "--quick"), lambda data: []),
}  # fmt: skip


def is_shown(value, text):
    """Return True if a text contains a number, possibly rounded, in percent or in byte units."""
    for digits, fraction in re.findall(r"(?<![\d.])(\d+)(?:\.(\d+))?(?![\d.]*\d)", text):
        number, unit = float(f"{digits}.{fraction or 0}"), 10 ** -len(fraction)
        scaled = (value, 100 * value, *(value / 1024**power for power in (1, 2, 3)))
        if any(abs(number - each) <= 0.501 * unit for each in scaled[: None if fraction else 2]):
            return True
    return False


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Word of a command → the file or folder that replaces the word."""
    folder = tmp_path_factory.mktemp("table")
    for weights in ("first", "second"):  # a table of one row has another shape
        filled(in_file(folder / "pages", weights=weights)).close()
    return {"PLUGIN": Path(write(folder / "mru.py")), "PAGES": folder / "pages"}


@pytest.mark.parametrize("name", COMMANDS)
def test_c1_at_80_columns_nothing_is_cut(name, files):
    words, numbers = COMMANDS[name]
    words = [files.get(word, word) for word in words]
    shown = terminal(*words, columns=80)
    assert shown.returncode == 0
    assert "━" in shown.stdout and "…" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80, shown.stdout
    missing = [n for n in numbers(json.loads(succeeds(*words, "--json"))) if n is not None
               and not is_shown(n, shown.stdout)]  # fmt: skip
    assert missing == [], shown.stdout


def test_c1_the_check_above_can_fail():
    assert is_shown(0.4234, "42.3%") and is_shown(7019274240, "6.5 GiB") and is_shown(12, "a 12 b")
    assert not is_shown(0.4234, "42.4%") and not is_shown(12, "112 1.12 12.5 3.12.5")


def test_c1_the_demonstration_s_table_and_texts():
    program = """
from fluxmoe.backends.vllm.child.inside import Generation
from fluxmoe.cli import demo
from fluxmoe.demo.compare import PAGE_FILE, TITLES, UNLIMITED, Comparison, Side
from fluxmoe.demo.model import SHIPPED, DemoModel
def side(name):
    paged, filed = "FluxMoE" in TITLES[name], name == PAGE_FILE
    stats = dict(slots=150, pages=384, hit_rate=0.987) if paged else {}
    tokens = [66 if name == UNLIMITED else 65] * 1234
    run = Generation([tokens], [], [], 1.0, 3, 96, stats)
    stored = 23 << 20 if paged else 0
    return Side((run,) * 3, 24, 3 << 20, 9 << 20, 0 if filed else stored, stored if filed else 0,
                25 << 20, 12345 << 20)
demo._print(Comparison((("Once", " upon a time " * 20),), 96, 22 << 20,
                       {name: side(name) for name in TITLES}), DemoModel.read(SHIPPED))
"""
    shown = terminal(columns=80, program=program)
    assert shown.returncode == 0 and "…" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80, shown.stdout
    for part in ("25.0 MiB", "48.0 MiB", "98.7%", "1234", "39%", "identical", "12.1 GiB"):
        assert part in shown.stdout
    verdicts = [line.split() for line in shown.stdout.splitlines() if line.startswith("│ tokens ")]
    found = [[word for word in words if word.isalpha()][1:] for words in verdicts]
    assert found == [["identical"] * 3 + ["DIFFERENT"], ["identical"] * 2]


@pytest.mark.parametrize("name", COMMANDS)
def test_c1_csv_is_the_data(name, files):
    words, numbers = COMMANDS[name]
    words = [files.get(word, word) for word in words]
    rows = list(csv.DictReader(io.StringIO(succeeds(*words, "--csv"))))
    data = json.loads(succeeds(*words, "--json"))
    assert rows and None not in rows[0]
    cells = {cell for row in rows for cell in row.values()}
    for number in numbers(data):
        assert str("" if number is None else number) in cells
    if isinstance(data, list) and name != "plugin check":
        assert len(rows) == len(data)
        assert list(rows[0]) == list(data[0])


def test_c1_every_verb_with_json_that_prints_a_table_has_csv():
    from tests.docs.commands import options, verbs

    without = {"generate", "trace record", "config show", "top", "limit"}  # these print no table
    for verb, command in verbs():
        assert ("--csv" in options(command)) == (
            "--json" in options(command) and verb not in without
        ), verb
    assert {name.partition(",")[0] for name in COMMANDS} | {"demo"} == {
        verb for verb, command in verbs() if "--csv" in options(command)
    }


def test_c1_one_format_at_a_time():
    done = here("policies", "--json", "--csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert "only one output format is possible; --json --csv" in done.stderr


# --- the printer ----------------------------------------------------------------------------------


def printed(capsys, *arguments, **options):
    table.show(*arguments, **options)
    return capsys.readouterr().out


def headings(text):
    return re.findall(r"┃ (.*?) ┃$", text, re.MULTILINE)


def test_c1_constant_columns_are_said_once(capsys):
    rows = [["lru", "none", "", "1"], ["lfu", "none", "", "2"]]
    text = printed(capsys, "Title", ["policy", "prefetch", "note"], ["misses"], rows)
    assert text.startswith("Title\nin every row: prefetch none\n")
    assert headings(text) == ["policy ┃ misses"]


def test_c1_a_single_row_is_a_list(capsys):
    row = ["lru", "", "1000000000", "0.5"]
    text = printed(capsys, "", ["policy", "note"], ["misses", "hit rate"], [row])
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    assert lines[1:-1] == [["policy", "lru"], ["misses", "1000000000"], ["hit rate", "0.5"]]


def test_c1_in_a_pipe_nothing_folds(capsys):
    long = "word " * 100
    text = printed(capsys, "t" * 300, ["a"], [f"n{i}" for i in range(60)],
                   [[long, *map(str, range(60))], ["b", *map(str, range(60, 120))]])  # fmt: skip
    assert text.splitlines()[0] == "t" * 300
    assert len(headings(text)) == 1 and long.strip() in text


WIDE = """
import sys
from fluxmoe.cli.shared import table
rows = [[f"policy-{i}", str(i), *(f"{10**9 + i * n}" for n in range(1, 13))] for i in range(3)]
table.show("wide", ["policy"], ["pages", *(f"count {n}" for n in range(1, 13))], rows, keys=2)
"""


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_c1_a_wide_table_becomes_several_that_repeat_the_keys(columns):
    text = terminal(columns=columns, program=WIDE).stdout
    assert max(map(len, text.splitlines())) <= columns
    assert all(str(10**9 + i * n) in text for i in range(3) for n in range(1, 13))
    assert text.count("┏") == text.count("policy-1") == {40: 12, 60: 4, 80: 3, 200: 1}[columns]


def test_c1_a_terminal_narrower_than_a_number_wraps_but_does_not_cut():
    text = terminal(columns=20, program=WIDE).stdout
    assert "…" not in text and all(str(10**9 + i * n) in text for i in range(3) for n in range(13))


def test_c1_the_tables_of_the_pages_are_not_wider_than_a_page():
    for page in PAGES:
        tables = [line for line in page.read_text().splitlines() if line[:1] in ("┃", "│")]
        assert max(map(len, tables), default=0) <= 100, page
