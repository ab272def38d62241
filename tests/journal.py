"""Runs of the whole suite that can be interrupted, resumed and sharded, for ``make test-full``.

    pytest -p tests.journal --journal FOLDER [--shard K/N]
    python -m tests.journal FOLDER

Passed tests are recorded in FOLDER, which belongs to one commit, and omitted by the next run. Shard
K of N takes each N-th file. Shards may share the folder, or their folders may be merged. The
command prints FOLDER as a table and fails unless every test of the suite has passed or was skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("journal")
    group.addoption("--journal", type=Path, metavar="FOLDER", required=True)
    group.addoption("--shard", type=shard, default=(1, 1), metavar="K/N")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Journal(config), "fluxmoe journal")


class Journal:
    """A plugin that omits tests that have passed, and records those that pass or are skipped."""

    def __init__(self, config: pytest.Config) -> None:
        folder: Path = config.getoption("journal")
        self.number, self.shards = config.getoption("shard")
        self._file = folder / f"{self.number}-of-{self.shards}.jsonl"
        given: dict[str, Any] | None = getattr(config, "workerinput", None)
        #: Read once, by the process that starts the workers, so all workers collect the same tests.
        self._done: list[str] = given["done"] if given else sorted(read(folder))
        self._writes = given is None
        #: Running tests, with the worst outcome of their phases so far.
        self._outcome: dict[str, str] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["done"] = self._done

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        done = set(self._done)
        # The note includes the tests of all shards, so that the table shows shards that never ran.
        if self._writes or config.workerinput["workerid"] == "gw0":  # type: ignore[attr-defined]
            self._note({"collected": [item.nodeid for item in items]})
        left = [item for item in items if self._is_mine(item) and item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
        items[:] = left

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome after the teardown, which may fail as well."""
        if not self._writes:
            return
        if report.when == "setup":
            self._outcome[report.nodeid] = "passed"
        if not report.passed:
            self._outcome[report.nodeid] = report.outcome
        if report.when == "teardown" and (outcome := self._outcome.pop(report.nodeid)) != "failed":
            self._note({"test": report.nodeid, "outcome": outcome})

    def _is_mine(self, item: pytest.Item) -> bool:
        path = item.nodeid.partition("::")[0]
        return zlib.crc32(path.encode()) % self.shards == self.number - 1

    def _note(self, row: dict[str, object]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(folder: Path) -> dict[str, str]:
    """Read the outcomes of all shards: test → ``passed`` or ``skipped``."""
    return {row["test"]: row["outcome"] for row in _rows(folder) if "test" in row}


def table(folder: Path) -> tuple[list[str], list[str]]:
    """Make table lines, one per folder of tests, and list the tests that have not passed."""
    outcomes = read(folder)
    collected = {test for row in _rows(folder) for test in row.get("collected", ())}
    counts: Counter[tuple[str, str]] = Counter()
    for test in collected:
        room, outcome = str(Path(test.partition("::")[0]).parent), outcomes.get(test, "left")
        counts.update([(room, outcome), ("~all", outcome)])
    lines = ["| tests | passed | skipped | left |", "|---|---|---|---|"]
    for room in sorted({room for room, _ in counts}):
        figures = " | ".join(f"{counts[room, what]:,}" for what in ("passed", "skipped", "left"))
        lines.append(f"| {room.removeprefix('~')} | {figures} |")
    return lines, sorted(collected - outcomes.keys())


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def shard(text: str) -> tuple[int, int]:
    """Parse ``K/N`` from a command line."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"not K/N with 1 <= K <= N: {text!r}")
    return int(number), int(of)


if __name__ == "__main__":
    lines, left = table(Path(sys.argv[1]))
    print("\n".join(lines))
    sys.exit("\n".join(["not passed:", *left]) if left else 0)
