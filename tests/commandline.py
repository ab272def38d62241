"""The command line as a user meets it, in this process or in one of its own."""

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fluxmoe.cli import main

ROOT = Path(__file__).parents[1]


def command(*arguments, program="from fluxmoe.cli import main; main()"):
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )  # fmt: skip


def here(*arguments):
    """The same in this process, which is quicker."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, exit_.value.code, out.getvalue(), err.getvalue())


def synth(**options):
    """The beginning of a command line."""
    yield from ("trace", "synth")
    for name, value in options.items():
        yield from (f"--{name.replace('_', '-')}", str(value))


def succeeds(*arguments, run=here):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(*arguments, code, message, run=here):
    """A FluxMoE error: one line on stderr, nothing on stdout, no traceback, exit code 2."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.match(rf"error\[{code}\]: .*{message}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    return done.stderr
