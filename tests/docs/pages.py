"""Execution of the code and commands on a documentation page.

A fenced block may be preceded by a comment with comma-separated directives: ``exact`` (the output
must match), ``exit N`` (the commands end with status N), ``slow``, ``needs vllm`` (the block runs
in a separate process), and ``not run: why`` (``bash`` only). Blocks need no other marks: every
``python`` and ``bash`` block runs, every ``$ fluxmoe`` line of a ``console`` block runs, and a
``python`` or ``yaml`` block with a title is written to the file of that name.

The pages of a newcomer's first hour are followed word for word (``follow``): their files are
written, and a shell runs all their commands, in a terminal of 80 columns and in an environment that
has a wheel of FluxMoE but not this checkout. The same applies to pages with ``fresh`` blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.commandline import COMPILING

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

#: The pages of a newcomer's first hour, which are followed in addition to pages with ``fresh``
#: blocks.
FIRST_HOUR = [
    ROOT / "README.md",
    ROOT / "docs/start/getting-started.md",
    ROOT / "docs/start/first-launch.md",
]
COLUMNS = 80
_TABLE = re.compile("[│┃]")

#: ``fluxmoe demo`` takes minutes and has a separate test.
ELSEWHERE = ("demo",)

_FENCE = re.compile(
    r"(?:^<!--(?P<directives>[^>]*)-->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)(?P<attributes>[^\n]*)\n"
    r"(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_DIRECTIVE = re.compile(r"exact|fresh|slow|needs vllm|exit \d+|not run: .+")
_TITLE = re.compile(r'title="([^"]+)"')


class WrongPage(AssertionError):
    """An error for a page whose code, command or output is wrong."""


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is the number of its first line."""

    language: str
    body: str
    title: str | None
    directives: frozenset[str]
    where: str
    line: int

    @property
    def needs_vllm(self) -> bool:
        return "needs vllm" in self.directives

    @property
    def not_run(self) -> bool:
        return any(directive.startswith("not run: ") for directive in self.directives)

    @property
    def status(self) -> int:
        return next((int(d.split()[1]) for d in self.directives if d.startswith("exit ")), 0)

    def commands(self) -> Iterator[tuple[list[str], str]]:
        """Yield the ``$`` lines of a console block as words, each with its output."""
        for line, output in self.lines():
            yield shlex.split(line, comments=True), output

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the ``$`` lines as they are written, each with its output."""
        parts = re.split(r"^\$ (.*)$", self.body, flags=re.MULTILINE)
        if parts[0].strip():
            raise WrongPage(f"{self.where}: a console block begins with a $ line")
        yield from zip(parts[1::2], parts[2::2], strict=True)

    def steps(self) -> Iterator[tuple[str, str]]:
        """Yield the commands that a newcomer runs in a shell, each with the output on the page."""
        if self.language == "console":
            yield from self.lines()
        elif self.language == "bash":
            yield f"set -e -o pipefail\n{self.body}", ""
        elif self.language == "python" and self.title is None:
            yield f"python - <<'END'\n{self.body}END", ""


def blocks(path: Path) -> list[Block]:
    """List all fenced blocks of a page, in order."""
    text = path.read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        title = _TITLE.search(match["attributes"])
        words = (match["directives"] or "").split(",")
        directives = frozenset(word.strip() for word in words if word.strip())
        unknown = [d for d in directives if not _DIRECTIVE.fullmatch(d)]
        if unknown and match["language"] in ("python", "console", "bash"):
            raise WrongPage(f"{path.name}:{line}: unknown directive {unknown[0]!r}")
        found.append(
            Block(
                language=match["language"],
                body=match["body"],
                title=title and title[1],
                directives=directives,
                where=f"{path.name}:{line}",
                line=line,
            )
        )
    return found


def run(path: Path, folder: Path) -> int:
    """Run a page from top to bottom in ``folder``; return the number of blocks that were run."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    ran = 0
    for block in blocks(path):
        if block.title is not None and block.language in ("python", "yaml"):
            (folder / block.title).write_text(block.body)
        if block.language == "python":
            if block.needs_vllm:
                _compiled(block, path)
                continue
            _execute(block, path, {"__name__": "plugin"} if block.title else namespace)
            ran += 1
        elif block.language == "console":
            for words, shown in block.commands():
                if words[0] != "fluxmoe":
                    raise WrongPage(f"{block.where}: {words[0]!r} cannot be tested, use ```bash")
                if words[1:2] and words[1] in ELSEWHERE:
                    continue
                _run_command(block, words, shown, folder)
                ran += 1
        elif block.language == "bash" and not (block.not_run or block.needs_vllm):
            _run_script(block, folder)
            ran += 1
        elif block.language in ("sh", "shell"):
            raise WrongPage(f"{block.where}: write ```bash")
    return ran


def run_with_vllm(path: Path, folder: Path) -> None:
    """Run a page's ``needs vllm`` blocks: those in bash, then all in Python in one process."""
    for block in blocks(path):
        if block.needs_vllm and block.language == "bash":
            with contextlib.chdir(folder):
                run(path, folder)  # creates files that the script needs
            _run_script(block, folder)
    parts = [b for b in blocks(path) if b.needs_vllm and b.language == "python"]
    script = folder / "snippets.py"
    # Every snippet keeps the line numbers that it has on the page, for tracebacks.
    script.write_text("")
    lines: list[str] = []
    for block in parts:
        lines += [""] * (block.line - 1 - len(lines)) + block.body.splitlines()
    script.write_text("\n".join(lines) + "\n")
    done = _process([sys.executable, script.name], folder)
    if done.returncode:
        raise WrongPage(f"{path.name}: status {done.returncode}\n{done.stdout[-4000:]}")


def follow(path: Path, folder: Path, environment: Mapping[str, str]) -> int:
    """Follow a page in ``folder`` like a newcomer; return the number of commands.

    Each command runs in a terminal of 80 columns, which no table may exceed. If the page has
    ``fresh`` blocks, only those run.
    """
    ran, here = 0, folder
    marked = any("fresh" in block.directives for block in blocks(path))
    for block in blocks(path):
        if block.title is not None:
            (here / block.title).write_text(block.body)
        elif block.not_run or (marked and "fresh" not in block.directives):
            continue
        for line, shown in block.steps():
            script = f"{line}\nstatus=$?\npwd > {folder}/.here\nexit $status"
            status, said = in_terminal(["bash", "-c", script], here, environment)
            where = f"{block.where}: $ {line}"
            if status != block.status:
                raise WrongPage(f"{where}: {status}\n{said}")
            # The page may show a whole line that the terminal breaks between words.
            if "exact" in block.directives and _words(said) != _words(shown):
                raise WrongPage(f"{where} printed\n{said}\nnot\n{shown}")
            wide = [row for row in said.splitlines() if _TABLE.search(row) and len(row) > COLUMNS]
            if wide or "…" in said:
                raise WrongPage(f"{where}: a table is wider than {COLUMNS} columns, or cut\n{said}")
            here = Path((folder / ".here").read_text().strip())
            ran += 1
    return ran


def in_terminal(
    command: list[str], folder: Path, environment: Mapping[str, str]
) -> tuple[int, str]:
    """Run a command in a plain terminal of 80 columns; return its status and output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    given = {key: value for key, value in environment.items() if key != "COLUMNS"}
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
        env={**given, "TERM": "dumb"}, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        late = threading.Timer(600, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        said = b""
        with contextlib.suppress(OSError):  # a terminal's output ends with an OSError
            while more := os.read(ours, 1 << 16):
                said += more
        process.wait()
        late.cancel()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode(errors="replace"))
    return process.returncode, text.replace("\r\n", "\n")


def _compiled(block: Block, path: Path) -> Any:
    try:
        return compile("\n" * (block.line - 1) + block.body, str(path), "exec")
    except SyntaxError as error:
        raise WrongPage(f"{block.where}: {error}") from error


def _execute(block: Block, path: Path, namespace: dict[str, Any]) -> None:
    code = _compiled(block, path)
    try:
        exec(code, namespace)
    except Exception as error:
        raise WrongPage(f"{block.where}: {type(error).__name__}: {error}") from error


def _run_command(block: Block, words: list[str], shown: str, folder: Path) -> None:
    program = "from fluxmoe.cli import main; main()"
    done = _process([sys.executable, "-c", program, *words[1:]], folder)
    command = f"{block.where}: $ {shlex.join(words)}"
    if done.returncode != block.status:
        raise WrongPage(f"{command}: status {done.returncode}\n{done.stdout}")
    if "exact" in block.directives and _lines(done.stdout) != _lines(shown):
        raise WrongPage(f"{command} printed\n{done.stdout}\nbut the page shows\n{shown}")


def _run_script(block: Block, folder: Path) -> None:
    # ``fluxmoe`` in the folder is the checkout's, even if another version is installed.
    program = folder / ".bin" / "fluxmoe"
    program.parent.mkdir(exist_ok=True)
    start = f"exec {shlex.quote(sys.executable)} -c 'from fluxmoe.cli import main; main()'"
    program.write_text(f'#!/bin/sh\n{start} "$@"\n')
    program.chmod(0o755)
    done = _process(["bash", "-eo", "pipefail", "-c", block.body], folder)
    if done.returncode:
        raise WrongPage(f"{block.where}: status {done.returncode}\n{done.stdout[-4000:]}")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in COMPILING.sub("", text).strip("\n").splitlines()]


def _words(text: str) -> list[str]:
    return [word for line in _lines(text) for word in line.split()]


def _process(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command; return its status and its output and errors, interleaved as on a terminal."""
    path = f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "PATH": path}
    with subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=400)
        finally:
            # End the servers that a page started before it failed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output)
