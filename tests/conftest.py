"""Setup for all tests: Hypothesis profile, selection and order, summary of the identity matrix."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.identity import report
from tests.identity.cells import Cell
from tests.identity.outcome import Outcome

settings.register_profile(
    "fluxmoe", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("fluxmoe")

#: Files that take about a minute or more. They start first, so that none runs alone at the end.
LONGEST = (
    "vllm/test_waves.py",
    "vllm/test_identity_matrix.py",
    "docs/test_snippets.py",
    "vllm/test_weights.py",
    "vllm/test_arbitration.py",
    "vllm/test_once.py",
    "vllm/test_leaks.py",
    "vllm/test_loading.py",
    "fuzz/test_fuzz.py",
    "vllm/test_control.py",
    "vllm/test_move_faults.py",
    "torch/test_identity.py",
    "vllm/test_errors.py",
    "docs/test_first_hour.py",
    "torch/test_compiled.py",
    "vllm/test_serve.py",
    "torch/test_faulty_policies.py",
    "testing/test_conformance.py",
    "test_examples.py",
    "vllm/test_plugin.py",
    "test_demo.py",
    "vllm/test_three_lines.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.has_plugin("tests.journal"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in set(full)]
    rank = {Path(__file__).parent / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Summarise the cells of the identity matrix, which tests report as `identity` properties."""
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
