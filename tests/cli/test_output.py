"""E11: no traceback, whatever the names are, and even if standard output accepts nothing."""

from __future__ import annotations

import os
import pty
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.commandline import ROOT, fails, succeeds, synth
from tests.plugins.rig import write

MAIN = "from fluxmoe.cli import main; main()"


def shell(line, **environment):
    """Run a line in a shell, with the command as the function ``f``."""
    python = shlex.join([sys.executable, "-c", MAIN])
    return subprocess.run(
        ["bash", "-c", f"f() {{ {python} \"$@\"; }}; {line}"],
        capture_output=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["[/red]", "[bold]", ":wolf:", "[link=x]y[/link]", "a[/]b"])
def test_e11_names_are_no_markup(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plugin = f"{name.replace('/', '')}.py"
    write(tmp_path / plugin, name=name)
    listed = succeeds("policies", "--plugin", plugin)
    assert f" {name} " in listed and f" {plugin} " in listed
    checked = succeeds("plugin", "check", plugin)
    assert f"eviction policy {name} conforms" in checked
    trace = f"{name.replace('/', '')}.parquet"
    succeeds(*synth(layers=2, experts=4, top_k=1, steps=3, batch=1), "--out", trace)
    assert f"{trace}: " in succeeds("trace", "info", trace)
    if ":" not in name and "=" not in name:  # both separate a policy's options
        run = ["simulate", trace, "--plugin", plugin, "--capacity", "4", "--policy", name]
        assert f" {name} " in succeeds(*run)


def test_e11_a_file_name_that_is_not_unicode(tmp_path):
    plugin = tmp_path / os.fsdecode(b"a\xff.py")
    shutil.copy(write(tmp_path / "mru.py"), plugin)
    done = shell(f"cd {shlex.quote(str(tmp_path))}; f policies --plugin $'a\\xff.py'")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"a\udcff.py" in done.stdout


def test_e11_a_character_that_the_terminal_has_not():
    done = shell("f policies", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u03c1" in done.stdout  # the ρ of rho


@pytest.mark.parametrize("options", ["", "--json"])
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_e11_closed_streams(options, closed):
    done = shell(f"f policies {options} {closed}")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("options", ["", "--json"])
def test_e11_a_full_disk(options):
    done = shell(f"f policies {options} >/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error[FM101]: the output is incomplete: No space left")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("url", ["http://[/red]", "http://[", "http://[::1"])
@pytest.mark.parametrize("verb", ["top", "limit", "policies --server"])
def test_e11_addresses_with_brackets(verb, url):
    fails(*verb.split(), url, code="FM101", message="not a valid server address")


ODD = {
    "a documentation that is computed": (
        "class Meta(type):\n    __doc__ = property(lambda cls: 1 / 0)\n",
        "ZeroDivisionError",
    ),
    "a declaration that is computed": (
        "class Meta(type):\n    needs_future = property(lambda cls: 1 / 0)\n",
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_e11_attributes_of_a_class_that_are_code(tmp_path, case):
    meta, error = ODD[case]
    plugin = tmp_path / "odd.py"
    write(
        plugin,
        f"import fluxmoe\n{meta}\nclass Odd(fluxmoe.EvictionPolicy, metaclass=Meta):\n"
        "    def score(self, view, pages): return pages\n"
        "@fluxmoe.hookimpl\ndef fluxmoe_register_policies(register): register('odd', Odd)\n",
    )
    fails("policies", "--plugin", plugin, code="FM202", message=f"raised {error}")


ANNOUNCE = """
import logging, sys
from fluxmoe.cli import _compilation_announced
with _compilation_announced():
    sys.stderr.write("half a bar")
    sys.stderr.flush()
    logging.getLogger("fluxmoe.compile").info("compiling")
"""


@pytest.mark.parametrize(
    ("terminal", "said"), [(True, b"half a bar\r\x1b[Kcompiling"), (False, b"half a barcompiling")]
)
def test_c9_a_message_replaces_an_unfinished_progress_bar(terminal, said):
    read, write = pty.openpty() if terminal else os.pipe()
    program = [sys.executable, "-c", ANNOUNCE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(program, stderr=write, check=True, env=environment)
    assert os.read(read, 1000).rstrip() == said
    os.close(write)
    os.close(read)
