"""New packages pass their own tests; ``plugin check`` finds faults."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import here
from tests.plugins.rig import MRU, install, write

ROOT = Path(__file__).parents[2]
KINDS = ("eviction", "prefetch", "arbitration", "codec")

needs_copier = pytest.mark.skipif(
    importlib.util.find_spec("copier") is None, reason="copier is not installed"
)


def run(*arguments, code=0):
    """Run a command; return its standard output or standard error."""
    done = here(*arguments)
    assert (done.returncode or 0) == code, done
    return done.stdout if code in (0, 1) else done.stderr


# --- fluxmoe plugin new ---------------------------------------------------------------------------


@needs_copier
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_passes_its_own_tests(tmp_path, kind):
    folder = tmp_path / "pack"
    printed = run("plugin", "new", "brand-new", "--kind", kind, "--output", folder)
    assert "fluxmoe-brand-new" in printed
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        *("README.md", "pyproject.toml", "fluxmoe_brand_new.py"),
        "tests/test_fluxmoe_brand_new.py",
    }
    assert not [file for file in files if "{{" in (folder / file).read_text()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert f"{2 if kind == 'arbitration' else 3} passed" in done.stdout
    verdict = json.loads(run("plugin", "check", folder / "fluxmoe_brand_new.py", "--json"))
    assert [(v["kind"], v["name"], v["conforms"]) for v in verdict] == [(kind, "brand-new", True)]


#: Policies and a codec that are legitimate, but useless on the kit's traces.
LEGITIMATE = {
    "eviction": """
import numpy as np
class Arc(fluxmoe.EvictionPolicy):
    def score(self, view, pages):
        return view.last_use[pages]
    def retain(self, view, access):
        return np.zeros(len(access.pages), bool)
""",
    "prefetch": """
class Arc(fluxmoe.PrefetchPolicy):
    lead = 1
    def propose(self, view, access):
        return []
""",
    "codec": """
class Arc(fluxmoe.Codec):
    def encode(self, raw):
        return raw.copy()
    def decode(self, coded, out):
        if len(coded) != len(out):
            raise fluxmoe.CodecError("of another size")
        out[:] = coded
""",
}


@needs_copier
@pytest.mark.slow
@pytest.mark.parametrize("kind", LEGITIMATE)
def test_d1_the_tests_of_a_new_package_know_its_policy_by_its_name_only(tmp_path, kind):
    folder = tmp_path / "pack"
    run("plugin", "new", "arc", "--kind", kind, "--output", folder)
    module = folder / "fluxmoe_arc.py"
    hook = module.read_text().partition("@fluxmoe.hookimpl")[2]
    hook = hook.replace("ArcPolicy", "Arc").replace("ArcCodec", "Arc")
    module.write_text(f"import fluxmoe\n{LEGITIMATE[kind]}\n@fluxmoe.hookimpl{hook}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


@needs_copier
def test_a_new_package_is_named_after_the_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("plugin", "new", "fluxmoe-sieve-2", "--kind", "eviction")
    text = Path("fluxmoe-sieve-2/pyproject.toml").read_text()
    assert 'name = "fluxmoe-sieve-2"' in text
    assert 'sieve-2 = "fluxmoe_sieve_2"' in text
    assert "class Sieve2Policy" in Path("fluxmoe-sieve-2/fluxmoe_sieve_2.py").read_text()
    # A second call is refused, because it would overwrite the user's changes.
    error = run("plugin", "new", "sieve-2", "--kind", "eviction", code=2)
    assert "error[FM101]: fluxmoe-sieve-2 already exists" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My Policy", "not a valid package name: 'My Policy'"),
        ("my_policy", "not a valid package name"),
        ("-x", "No such option"),
        ("fluxmoe-", "not a valid package name"),
        ("../evil", "not a valid package name"),
        ("lru", "fluxmoe already registers the eviction policy 'lru'"),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    assert message in run("plugin", "new", name, "--kind", "eviction", code=2)
    assert not list(tmp_path.iterdir())


def test_without_copier_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "copier", None)
    error = run("plugin", "new", "mine", "--kind", "codec", code=2)
    assert "error[FM404]" in error
    assert "pip install 'fluxmoe[plugin]'" in error


# --- fluxmoe plugin check -------------------------------------------------------------------------

BAD = """
import fluxmoe

class Good(fluxmoe.EvictionPolicy):
    def score(self, view, pages):
        return view.use_count[pages]

class Short(fluxmoe.EvictionPolicy):
    def score(self, view, pages):
        return view.use_count[pages][1:]

class Codec(fluxmoe.Codec):
    def encode(self, raw):
        return raw[::-1].copy()
    def decode(self, coded, out):
        out[:] = coded

@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("good", Good)
    register("short", Short)

@fluxmoe.hookimpl
def fluxmoe_register_codecs(register):
    register("backwards", Codec)
"""


def test_the_verdict_names_rule_call_value_and_way_out(tmp_path):
    path = write(tmp_path / "bad.py", BAD)
    printed = run("plugin", "check", path, code=1)
    assert "eviction policy good conforms" in printed
    assert "eviction policy short does not conform" in printed
    assert "codec backwards does not conform" in printed
    assert "broken rule: answers" in printed
    assert "call:  score in event" in printed
    assert "fix:   return one number per page" in printed
    assert "belady" in printed  # misses of other policies on the golden traces
    verdicts = json.loads(run("plugin", "check", path, "--json", code=1))
    by_name = {verdict["name"]: verdict for verdict in verdicts}
    assert {name: v["conforms"] for name, v in by_name.items()} == {
        **{"good": True, "short": False, "backwards": False},
    }
    broken = [rule for rule in by_name["short"]["rules"] if rule["status"] == "broken"]
    assert [rule["rule"] for rule in broken] == ["answers"]
    assert all(broken[0][part] for part in ("detail", "call", "mend"))
    assert by_name["good"]["misses"]["sparse"]["lru"] == 320
    assert by_name["short"]["misses"] == {}


@pytest.mark.parametrize(
    ("expression", "mend"),
    [
        ("view.use_counts[pages]", "did you mean 'use_count'?; a PageView has event, "),
        ("view.zzz[pages]", "a PageView has event, experts_per_layer, last_use, layer, "),
        ("self.cuont[pages] if self.count else pages", "did you mean 'count'?; set self.cuont in"),
        ("pagse", "did you mean 'pages'?"),
        ("self.zzz", "set self.zzz in __init__, and again in reset, before score reads it"),
        ("pages.argmx()", "did you mean 'argmax'?"),
        ("view.next_use[pages]", "avoid it, or set needs_future = True"),
    ],
)
def test_d3_advice_for_an_attribute_that_does_not_exist(tmp_path, expression, mend):
    source = MRU.replace("return -view.last_use[pages]", f"return {expression}")
    source = source.replace("    def score", "    count = [0] * 10**6\n    def score")
    assert expression in source
    path = write(tmp_path / "p.py", source)
    (verdict,) = json.loads(run("plugin", "check", path, "--json", code=1))
    mends = [rule["mend"] for rule in verdict["rules"] if rule["status"] == "broken"]
    assert any(mend in found for found in mends), mends


def test_one_policy_with_options(tmp_path):
    source = MRU.replace("class Most", "from pydantic import BaseModel\nclass Most")
    source = source.replace(
        "    def score",
        "    def __init__(self, sign):\n        self.sign = sign\n    def score",
    ).replace("return -view", "return self.sign * view")
    source = source.replace(
        "@fluxmoe.hookimpl", "class Options(BaseModel):\n    sign: int\n\n@fluxmoe.hookimpl"
    ).replace("MostRecentlyUsed)", "MostRecentlyUsed, Options)")
    path = write(tmp_path / "mru.py", source, name="mine")
    assert "sign" in run("plugin", "check", path, code=1)  # `sign` has no default
    found = json.loads(run("plugin", "check", path, "--policy", "mine:sign=-1", "--json"))
    assert [v["conforms"] for v in found] == [True]
    error = run("plugin", "check", path, "--policy", "yours", code=2)
    assert "registers no 'yours'" in error
    assert "it registers mine" in error


@pytest.mark.parametrize("called", ["pony", "fluxmoe-pony", "Fluxmoe.Pony"])
def test_an_installed_plugin_is_checked_by_its_name(site, monkeypatch, called):
    write(site / "pony_policy.py", name="mine")
    install(site, "fluxmoe-pony", {"pony": "pony_policy"})
    monkeypatch.delenv("FLUXMOE_PLUGINS")
    assert "eviction policy mine conforms" in run("plugin", "check", called)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nowhere.py", "error[FM202]: no such file; plugin nowhere.py"),
        ("no_such_module", "error[FM202]: cannot import the plugin: ModuleNotFoundError"),
    ],
)
def test_what_is_not_there(what, message):
    assert message in run("plugin", "check", what, code=2)


def test_a_broken_installed_plugin_is_told_with_its_reason(site, monkeypatch):
    write(site / "pony_policy.py", "import saddle")
    install(site, "fluxmoe-pony", {"pony": "pony_policy"})
    monkeypatch.delenv("FLUXMOE_PLUGINS")
    error = run("plugin", "check", "pony", code=2)
    assert (
        "error[FM202]: the plugin is broken: cannot import pony_policy: ModuleNotFoundError"
        in error
    )
    monkeypatch.setenv("FLUXMOE_PLUGINS", "")
    error = run("plugin", "check", "pony", code=2)
    assert "the plugin is left out: not in FLUXMOE_PLUGINS" in error
