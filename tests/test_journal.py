"""``make test-full``: passed tests are not run again; shards run each test once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import journal

ROOT = Path(__file__).parents[1]
TESTS = {
    "test_one.py": "def test_passes(): pass\ndef test_fails(): assert OK\n",
    "test_two.py": "import pytest\n@pytest.mark.skip\ndef test_skipped(): pass\n",
    "test_three.py": "def test_a(): pass\ndef test_b(): pass\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, source in TESTS.items():
        (tmp_path / name).write_text(f"OK = False\n{source}")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run(project: Path, *options: str) -> tuple[int, str]:
    """Run the project's suite with the journal; return exit code and last line."""
    plugins = ["-p", "tests.journal", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--journal", "journal", *options]
    done = subprocess.run(
        command, cwd=project, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    return done.returncode, (done.stdout or done.stderr).splitlines()[-1]


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two processes"])
def test_a_run_goes_on_where_it_stopped(project: Path, workers: tuple[str, ...]) -> None:
    code, last = run(project, *workers)
    assert code == 1
    assert last.startswith("1 failed, 3 passed, 1 skipped")
    lines, left = journal.table(project / "journal")
    assert lines[-1] == "| all | 3 | 1 | 1 |"
    assert left == ["test_one.py::test_fails"]

    (project / "test_one.py").write_text(f"OK = True\n{TESTS['test_one.py']}")
    code, last = run(project, *workers)
    assert code == 0
    assert last.startswith("1 passed")
    assert journal.table(project / "journal")[1] == []
    assert run(project, *workers)[0] == pytest.ExitCode.NO_TESTS_COLLECTED


def test_shards_share_the_suite(project: Path) -> None:
    (project / "test_one.py").write_text(f"OK = True\n{TESTS['test_one.py']}")
    for number in (1, 2, 3):
        assert run(project, "--shard", f"{number}/3")[0] in (0, pytest.ExitCode.NO_TESTS_COLLECTED)
    lines, left = journal.table(project / "journal")
    assert lines[-1] == "| all | 4 | 1 | 0 |"
    assert left == []


def test_a_shard_that_never_ran_is_missed(project: Path) -> None:
    ran = [run(project, "--shard", f"{number}/3")[1] for number in (1, 2)]
    assert any("passed" in last for last in ran)
    left = journal.table(project / "journal")[1]
    assert set(left) > {"test_one.py::test_fails"}


def test_a_test_whose_tear_down_fails_has_not_passed(project: Path) -> None:
    (project / "test_one.py").write_text(
        "import pytest\n@pytest.fixture\ndef ends():\n    yield\n    assert False\n"
        "def test_ends_badly(ends): pass\n"
    )
    assert run(project)[0] == 1
    assert journal.table(project / "journal")[1] == ["test_one.py::test_ends_badly"]
    assert run(project)[0] == 1  # so the test runs again


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_a_wrong_shard(project: Path, shard: str) -> None:
    code, _ = run(project, f"--shard={shard}")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert not (project / "journal").exists()
