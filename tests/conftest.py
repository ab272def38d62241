"""Shared by all tests: how Hypothesis runs, and the identity matrix at the end of the output."""

import os

import pytest
from hypothesis import settings

from benchmarks.identity import report
from benchmarks.identity.cells import Cell
from benchmarks.identity.outcome import Outcome

settings.register_profile(
    "fluxmoe", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("fluxmoe")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The cells that tests have run, counted: `identity` among their properties is one each."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for test in terminalreporter.getreports(outcome)
        for name, value in test.user_properties
        if name == "identity"
    ]
    if rows:
        results = {Cell(**row["cell"]): Outcome(**row["outcome"]) for row in rows}
        terminalreporter.section("identity matrix: cells and sequences identical to stock")
        terminalreporter.write_line(report.plain(report.summary(results)))
        for line in report.failures(results):
            terminalreporter.write_line(line)
