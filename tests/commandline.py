"""Ways of running the command line: in this process, in a separate one, or on a terminal."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fluxmoe.cli import main

ROOT = Path(__file__).parents[1]


#: Printed by the first process that needs the machine code; in a terminal, after a progress line.
COMPILING = re.compile(r"^\r?compiling inner loops of FluxMoE, .*\n", re.MULTILINE)


def command(*arguments, program="from fluxmoe.cli import main; main()"):
    """Run a command in a separate process."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )  # fmt: skip
    done.stderr = COMPILING.sub("", done.stderr)
    return done


def terminal(*arguments, columns=80, program="from fluxmoe.cli import main; main()", **environment):
    """Run a command on a terminal of the given width; return its output without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment}
    surroundings.pop("COLUMNS", None)
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=theirs, stderr=subprocess.DEVNULL, env=surroundings,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal's output ends with an OSError
            while more := os.read(ours, 1 << 16):
                shown += more
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n")
    return subprocess.CompletedProcess(arguments, process.returncode, text, "")


def here(*arguments):
    """Run a command in this process, which is faster."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    said = COMPILING.sub("", err.getvalue())
    return subprocess.CompletedProcess(arguments, exit_.value.code, out.getvalue(), said)


def synth(**options):
    """Make the beginning of a ``trace synth`` command line."""
    yield from ("trace", "synth")
    for name, value in options.items():
        yield from (f"--{name.replace('_', '-')}", str(value))


def succeeds(*arguments, run=here):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(*arguments, code, message, run=here):
    """Assert a FluxMoE error: one line on stderr, nothing on stdout, no traceback, exit code 2."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.match(rf"error\[{code}\]: .*{message}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    return done.stderr
