"""Arguments of the Python API: classes and instances as policies, wrong types, existing files.

These are tests of B5 and B10; those that need torch are in ``tests/torch/test_arguments.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import fluxmoe
from fluxmoe import arguments, config, plugins
from fluxmoe.backends.vllm import engine_options
from fluxmoe.errors import ConfigError, FluxMoEError, PluginLoadError
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.testing import GOLDEN, check_codec, check_eviction_policy
from fluxmoe.trace import TraceMeta, TraceReader, TraceWriter, shipped
from fluxmoe.trace.formats import convert
from fluxmoe.trace.synth import Workload, write
from tests.commandline import fails, here

TRACE = GOLDEN["sparse"].events


class MyLru(fluxmoe.EvictionPolicy):
    """LRU that is not registered."""

    def score(self, view, pages):
        return view.last_use[pages]


class Sticky(fluxmoe.EvictionPolicy):
    """A policy that is LRU until its 200th call, then the opposite; it has an option."""

    def __init__(self, calls=200):
        self.most = calls
        self.reset()

    def reset(self):
        self.calls = 0

    def score(self, view, pages):
        self.calls += 1
        return view.last_use[pages] * (1 if self.calls < self.most else -1)


class Ahead(fluxmoe.PrefetchPolicy):
    lead = 1

    def propose(self, view, access):
        return view.page_of((access.layer + 1) % view.num_layers, [0])


class Future(fluxmoe.EvictionPolicy):
    needs_future = True

    def score(self, view, pages):
        return -view.next_use[pages]


# --- B5: policies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [MyLru, MyLru(), {"kind": MyLru}, {"kind": MyLru()}])
def test_b5_a_class_or_an_instance_is_a_policy(policy):
    result, lru = simulate(TRACE, policy, "50%"), simulate(TRACE, "lru", "50%")
    assert (result.policy, result.prefetch) == ("MyLru", "none")
    assert (result.hits, result.evictions) == (lru.hits, lru.evictions)


def test_b5_options_go_to_the_class():
    results = [
        simulate(TRACE, policy, "50%").misses
        for policy in ({"kind": Sticky, "calls": 3}, Sticky(3), {"kind": Sticky}, Sticky())
    ]
    assert results[0] == results[1] != results[2] == results[3]
    assert simulate(TRACE, {"kind": Sticky, "calls": 3}, "50%").policy == "Sticky:calls=3"


def test_b5_an_instance_starts_anew_in_every_run():
    policy = Sticky()
    assert simulate(TRACE, policy, "50%") == simulate(TRACE, policy, "50%")


def test_b5_prefetchers_and_oracles():
    assert simulate(TRACE, "lru", "50%", Ahead).loads_prefetch > 0
    assert simulate(TRACE, Future(), "50%").misses == simulate(TRACE, "belady", "50%").misses


def test_b5_an_oracle_is_refused_by_engines_whatever_its_form():
    for policy in (Future, Future()):
        parsed = config.parse({"memory": {"budget": 1}, "eviction": policy}, where="")
        with pytest.raises(fluxmoe.FluxMoEError, match=r"FM204: .*'Future'"):
            plugins.load().policies(parsed)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Ahead, "no eviction policy in.*fluxmoe.EvictionPolicy"),
        (Ahead(), "no eviction policy in"),
        (int, "no eviction policy in <class 'int'>"),
        (None, "no eviction policy in None"),
        (3, "no eviction policy in 3"),
        (lambda: MyLru(), "no eviction policy in"),
        (fluxmoe.EvictionPolicy, "no eviction policy in"),
        ({"kind": MyLru(), "calls": 3}, "unknown option 'calls'.*there are no options"),
        ({}, "no eviction policy in"),
    ],
)
def test_b5_what_is_no_policy(policy, says):
    with pytest.raises(ConfigError, match=says):
        simulate(TRACE, policy, "50%")


def test_b5_a_class_that_cannot_be_made():
    with pytest.raises(PluginLoadError, match=r"'Sticky' cannot be created: TypeError.*'kalls'"):
        simulate(TRACE, {"kind": Sticky, "kalls": 3}, "50%")


# --- B5: wrong types ------------------------------------------------------------------------------

WRONG = {
    "trace": (lambda: simulate(None, "lru", "50%"), "trace must be a path, not None"),
    "no trace": (lambda: simulate("", "lru", "50%"), "trace must be a path, not ''"),
    "events": (lambda: Events.load(3), "path must be a path, not 3"),
    "capacity": (lambda: simulate(TRACE, "lru", None), "not a valid capacity: 'None'"),
    "banks": (lambda: simulate(TRACE, "lru", "50%", banks="2"), "banks must be a whole .*'2'"),
    "no bank": (lambda: simulate(TRACE, "lru", "50%", banks=0), "at least 1, not 0"),
    "banks yes": (lambda: simulate(TRACE, "lru", "50%", banks=True), "not True"),
    "registry": (
        lambda: simulate(TRACE, "lru", "50%", registry=["pol.py"]),
        r"registry must be a fluxmoe\.Registry, not \['pol\.py'\].*plugins\.load",
    ),
    "hardware": (lambda: simulate(TRACE, "lru", "50%", hardware=3), "hardware must be a path"),
    "plugins": (lambda: plugins.load(3), "extra must be files or modules, not 3"),
    "plugin": (lambda: plugins.load([None]), "a plugin must be a path, not None"),
    "reader": (lambda: TraceReader(None), "path must be a path, not None"),
    "writer": (lambda: TraceWriter(b"x", TraceMeta("", 1, 2, 1, None, "")), "not b'x'"),
    "shipped": (lambda: shipped.path(3), "unknown trace 3"),
    "settings": (lambda: engine_options("8GiB"), "expected a map of settings, not '8GiB'"),
    "settings' keys": (lambda: engine_options({"memry": {}}), "unknown key 'memry'"),
    "no settings": (lambda: config.parse(["x"], where="here"), "expected a map.*here"),
    "kit": (lambda: check_eviction_policy("lru"), "factory must be a class, or a function"),
    "kit's instance": (lambda: check_eviction_policy(MyLru()), "factory must be a class"),
    "codec": (lambda: check_codec(None), "factory must be a class, or a function.*None"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_b5_wrong_types(case):
    call, says = WRONG[case]
    with pytest.raises(FluxMoEError, match=says):
        call()


def test_b5_plugins_as_text_path_or_list(tmp_path):
    file = tmp_path / "p.py"
    file.write_text(
        "import fluxmoe\nfrom tests.test_arguments import MyLru\n"
        "@fluxmoe.hookimpl\ndef fluxmoe_register_policies(register): register('mine', MyLru)\n"
    )
    for given in (str(file), file, [file], (str(file),)):
        assert "mine" in plugins.load(given).names("eviction")
        parsed = config.parse({"memory": {"budget": 1}, "plugins": given}, where="")
        assert parsed.plugins == [str(file)]


# --- B10 ------------------------------------------------------------------------------------------


def test_b10_a_file_that_exists_is_not_replaced(tmp_path):
    file, workload = tmp_path / "t", Workload(2, 4, 1, 3, 1)
    write(workload, file)
    before, meta = file.read_bytes(), TraceMeta("", 2, 4, 1, None, "")
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"layer_idx": 0, "token_idx": 0, "selected_ids": [3, 1]}\n')
    for attempt in (
        lambda: write(workload, file),
        lambda: TraceWriter(file, meta),
        lambda: convert(lines, file),
        lambda: arguments.require_new(file, replace=False),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert caught.value.text == (
            f"the file already exists; {file}; "
            "name another file, or replace this one (replace=True)"
        )
        assert file.read_bytes() == before
    convert(lines, file, replace=True)
    assert file.read_bytes() != before
    write(workload, file, replace=True)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "TRACE", "--policy", "lru", "--capacity", "50%", "--report", "FILE"),
        ("trace", "info", "TRACE", "--picture", "FILE.svg"),
        ("plan", "MODEL", "--memory", "16MiB", "--context", "64", "--picture", "FILE.svg"),
        ("doctor", "--measure", "FILE.yaml"),
        ("trace", "convert", "TRACE", "--out", "FILE"),
        ("trace", "synth", "--layers", "1", "--experts", "2", "--top-k", "1", "--steps", "1",
         "--batch", "1", "--out", "FILE"),
        ("trace", "record", "MODEL", "--prompt-ids", "1", "--out", "FILE"),
    ],
    ids=lambda words: " ".join(words[:2]),
)  # fmt: skip
def test_b10_every_command_that_writes_a_file(words, tmp_path):
    from fluxmoe.demo.model import SHIPPED

    places = {"TRACE": str(shipped.path("decode-1")), "MODEL": str(SHIPPED)}
    words = [places.get(word, word.replace("FILE", str(tmp_path / "f"))) for word in words]
    file = Path(next(word for word in words if word.startswith(str(tmp_path))))
    file.write_text("precious")
    if words[1] == "convert":  # its source must be of another format
        words[2] = str(tmp_path / "x.jsonl")
        Path(words[2]).write_text('{"layer_idx": 0, "token_idx": 0, "selected_ids": [3, 1]}\n')
    fails(*words, code="FM101", message="the file already exists; .*--force")
    assert file.read_text() == "precious"
    assert "--force" in here(*words[: 2 if words[0] == "trace" else 1], "--help").stdout


def test_b10_force_replaces_a_report(tmp_path):
    report = tmp_path / "r.html"
    report.write_text("old")
    words = ("simulate", shipped.path("decode-1"), "--policy", "lru", "--capacity", "50%")
    done = here(*words, "--report", report, "--force")
    assert done.returncode in (0, None) and report.read_text() != "old"
