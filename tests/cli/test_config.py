"""``fluxmoe config``: errors, output, and the committed files."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fluxmoe import config, dimensions, plugins
from fluxmoe.backends.vllm.preflight import checks
from fluxmoe.backends.vllm.server import launch
from fluxmoe.core.policy.watchdog import Limits
from fluxmoe.errors import ConfigError
from tests.commandline import here

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/fluxmoe.yaml"
SCHEMA = ROOT / "docs/fluxmoe.schema.json"
SMALL = {"memory": {"budget": "1GiB"}}


@pytest.fixture(autouse=True)
def no_installed_plugins(monkeypatch):
    monkeypatch.setenv("FLUXMOE_PLUGINS", "")


def run(*arguments):
    done = here("config", *arguments)
    return done.returncode or 0, done.stdout, done.stderr


def succeeds(*arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    return out


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "c.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return path

    return write


def free_memory(monkeypatch, nbytes):
    machine = SimpleNamespace(available=nbytes, total=max(nbytes, 1 << 34))
    monkeypatch.setattr("psutil.virtual_memory", lambda: machine)


NO_MODEL = "note: no model is given, so the model and its memory are not checked\n"

# --- check ---------------------------------------------------------------------------------------


def test_check_of_what_is_right(write):
    path = write({**SMALL, "eviction": {"kind": "lfru", "recency": 1}})
    assert succeeds("check", path) == f"{path}: ok\n{NO_MODEL}"


def test_an_automatic_budget_is_told(write, tmp_path, monkeypatch):
    from fluxmoe.demo.model import SHIPPED

    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 30, total=1 << 30)
    )
    weights = sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors"))
    budget = ((1 << 30) - weights) // 2 >> 20
    path = write({"model": str(SHIPPED), "memory": {"budget": "auto"}})
    told = f"memory.budget: auto is currently {budget:.1f} MiB per worker, 50%"
    assert told in succeeds("check", path)
    shown = succeeds("show", path)
    assert yaml.safe_load(shown)["memory"]["budget"] == "auto"
    assert f"# {told}" in shown
    flags = launch.arguments(checks.resolved(config.load(path)))
    given = json.loads(flags[flags.index("--additional-config") + 1])["fluxmoe"]
    assert given == {"memory": {"budget": budget << 20}}
    two = write({"model": str(SHIPPED), "memory": {"budget": "auto"},
                 "vllm": {"tensor_parallel_size": 2}})  # fmt: skip
    assert f"auto is currently {((1 << 30) - weights) // 4 >> 20:.1f} MiB" in succeeds("check", two)
    assert succeeds("check", write({"memory": {"budget": "auto"}})).count("\n") == 2

    # A page file holds the experts, so only the other weights count.
    on_disk = write({"model": str(SHIPPED), "memory": {"budget": "auto"},
                     "stores": [{"kind": "file", "path": str(tmp_path)}]})  # fmt: skip
    assert f"{((1 << 30) - weights) // 2 >> 20:.1f} MiB" not in succeeds("check", on_disk)
    model = dimensions.of_checkpoint(SHIPPED)
    others = ((1 << 30) - weights + model.experts_bytes) // 2 >> 20
    assert f"auto is currently {others:.1f} MiB" in succeeds("check", on_disk)

    for broken, message in (
        ({"model": "org/name", "memory": {"budget": "auto"}}, "not a folder with safetensors"),
        ({"model": str(tmp_path), "memory": {"budget": "auto"}}, "not a folder with safetensors"),
    ):
        code, _, err = run("check", write(broken))
        assert code == 2 and "error[FM101]" in err and message in err
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20, total=1 << 30)
    )
    two.write_text(yaml.safe_dump({"model": str(SHIPPED), "memory": {"budget": "auto"}}))
    code, _, err = run("check", two)
    assert code == 2 and "leave none of the" in err


def test_off_is_told(write):
    path = write({**SMALL, "preset": "off", "eviction": "lru"})
    assert "policies have no effect" in succeeds("check", path)
    assert yaml.safe_load(succeeds("show", path))["preset"] == "off"


BAD = {
    "unknown key": ({**SMALL, "evict": "lru"}, "FM101", r"'evict'.*did you mean 'eviction'\?"),
    "unknown key below": ({"memory": {"budget": 1, "kvs": {}}}, "FM101", r"'memory\.kvs'"),
    "missing": ({}, "FM101", r"'memory' is missing.*add it"),
    "missing below": ({"memory": {}}, "FM101", r"'memory\.budget' is missing"),
    "no size": ({"memory": {"budget": "lots"}}, "FM101", r"memory\.budget: .*'lots'.*24GiB"),
    "no unit": ({"memory": {"budget": "3 ponies"}}, "FM101", r"memory\.budget: .*ponies.*MiB"),
    "no budget after all": ("memory: {budget: }", "FM101", r"memory\.budget: .*None.*24GiB"),
    "a budget of 0": ({"memory": {"budget": 0}}, "FM101", r"memory\.budget: .*greater than 0"),
    "a budget below 0": ({"memory": {"budget": -1}}, "FM101", r"memory\.budget: .*size: -1 "),
    "a bound": (
        {"memory": {"budget": 1, "kv": {"max": "much"}}}, "FM101", r"memory\.kv\.max: .*'much'",
    ),
    "yes as a size": ({"memory": {"budget": True}}, "FM101", r"budget: .*: True .*24GiB"),
    "no map": ({"memory": "1GiB"}, "FM101", r"memory: it must be a map, not '1GiB'"),
    "bounds": (
        {"memory": {"budget": 9, "kv": {"min": "2KiB", "max": "1KiB"}}},
        "FM101",
        r"memory\.kv: min must not be above max, not .*'2KiB'",
    ),
    "banks": ({"memory": {"budget": 1, "banks": 0}}, "FM101", r"memory\.banks: .*not 0"),
    "preset": ({**SMALL, "preset": "fast"}, "FM101", r"preset: .*'default'.*not 'fast'.*schema"),
    "store": ({**SMALL, "stores": [{"kind": "tape"}]}, "FM101", r"stores\.0\.kind: .*'tape'"),
    "store without a kind": ({**SMALL, "stores": [{"path": "x"}]}, "FM101", r"stores\.0\.kind"),
    "store not a map": ({**SMALL, "stores": ["host"]}, "FM101", r"stores\.0: it must be a map"),
    "store with a wrong key": ({**SMALL, "stores": [{"kind": "host", "path": "x"}]}, "FM101",
                               r"unknown key 'stores\.0\.path'"),
    "file without a name": ({**SMALL, "stores": [{"kind": "file", "path": ""}]}, "FM101",
                            r"stores\.0\.path: it must be non-empty text"),
    "store after one without a limit": ({**SMALL, "stores": [{"kind": "host"}] * 2}, "FM101",
                                        r"stores: store 0 has no limit.*but the last a limit"),
    "codec": ({**SMALL, "stores": [{"kind": "host", "codec": "zip"}]}, "FM306", "codec 'zip'"),
    "no store": ({**SMALL, "stores": []}, "FM101", r"stores: .*at least 1"),
    "threads": ({**SMALL, "copy_threads": "two"}, "FM101", r"copy_threads: .*'two'"),
    "seed": ({**SMALL, "seed": 1.5}, "FM101", r"seed: .*not 1\.5"),
    "plugins": ({**SMALL, "plugins": 3}, "FM101", r"plugins: .*list.*not 3"),
    "strikes": (
        {**SMALL, "policy_limits": {"strikes": 0}}, "FM101", r"policy_limits\.strikes: .*not 0",
    ),
    "no time": ({**SMALL, "policy_limits": {"hard_s": 0}}, "FM101", r"limits\.hard_s: .*not 0"),
    "for ever": (
        {**SMALL, "policy_limits": {"hard_s": float("inf")}}, "FM101", r"hard_s: .*3600.*not inf",
    ),
    "policy": ({**SMALL, "eviction": "lruu"}, "FM201", r"eviction policy 'lruu'.*lfru, lfu, lru"),
    "policy that is none": ({**SMALL, "eviction": 3}, "FM101", r"eviction: it.*map.*not 3.*name"),
    "nameless": ({**SMALL, "prefetch": {"depth": 1}}, "FM101", r"'depth': 1.*prefetch.*kind:"),
    "no options": (
        {**SMALL, "eviction": {"kind": "lru", "k": 1}}, "FM101", r"'k'.*'lru'.*no options",
    ),
    "option": (
        {**SMALL, "eviction": {"kind": "lfru", "recent": 1}}, "FM101", r"'recent'.*: recency",
    ),
    "option's value": (
        {**SMALL, "prefetch": {"kind": "next-layer", "depth": 0}}, "FM101", r"depth: .*not 0",
    ),
    "oracle": ({**SMALL, "eviction": "belady"}, "FM204", r"'belady'.*eviction.*simulate"),
    "plugin": ({**SMALL, "plugins": ["no.py"]}, "FM202", r"no such file.*no\.py"),
    "a list": ("- 1\n", "FM101", r"expected a map of settings, not \[1\]"),
    "nothing": ("", "FM101", "the document is empty; "),
    "a key twice": (
        "memory: {budget: 1GiB}\nseed: 1\nmemory: {budget: 2GiB}",
        "FM101",
        "duplicate key 'memory'; .*, line 3, column 1",
    ),
    "a tab": ("memory:\n\tbudget: 1GiB", "FM101", r"cannot start any token; .*, line 2, column 1"),
    "a negative number": (
        "memory: {budget: 1GiB}\ncopy_threads: -1",
        "FM101",
        "copy_threads: it must be greater than or equal to 0, not -1",
    ),
    "a negative size": ("memory: {budget: -1GiB}", "FM101", "not a valid size: '-1GiB'"),
    "a list for a text": ("memory: {budget: 1GiB}\nmodel: [x]", "FM101", "model: it must be text"),
    "no YAML": ("memory: {budget: 1", "FM101", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["check", "show"])
@pytest.mark.parametrize("case", BAD)
def test_an_error_names_key_value_and_way_out(case, verb, write):
    data, code, message = BAD[case]
    status, out, err = run(verb, write(data))
    assert (status, out) == (2, "")
    assert re.match(rf"error\[{code}\]: .*{message}", err, re.DOTALL), err
    assert "Traceback" not in err


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot read the file" in run("check", tmp_path / "none.yaml")[2]
    assert "the path is a folder" in run("check", tmp_path)[2]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert run("check", tmp_path / "binary")[0] == 2


def test_policies_of_plugins_are_known(write, tmp_path):
    plugin = tmp_path / "mru.py"
    plugin.write_text(
        "import fluxmoe\n"
        "class Mru(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages): return -view.last_use[pages]\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register): register('mru', Mru)\n"
    )
    succeeds("check", write({**SMALL, "eviction": "mru", "plugins": [str(plugin)]}))


# --- show ----------------------------------------------------------------------------------------


def test_show_fills_in_defaults_also_of_policies(write):
    path = write({"memory": {"budget": 3 << 29, "kv": {"min": 12345}}, "eviction": "lfru",
                  "prefetch": "next-layer", "vllm": {"port": None}})  # fmt: skip
    shown = yaml.safe_load(succeeds("show", path))
    auto = {"min": "auto", "target": "auto", "max": "auto"}
    assert shown == {
        "model": None,
        "memory": {"budget": "1536MiB", "experts": auto, "kv": {**auto, "min": 12345},
                   "frame": "auto", "banks": 1},
        "preset": "default",
        "eviction": {"kind": "lfru", "recency": 0.3},
        "prefetch": {"kind": "next-layer", "depth": 1},
        "arbitration": "fixed",
        "policy_limits": {"strikes": 16, "soft_ms": 5.0, "hard_s": 2.0},
        "stores": [{"kind": "host", "limit": "auto", "codec": "none"}],
        "control": False, "plugins": [], "strict_policies": False, "copy_threads": 1, "seed": 0,
        "vllm": {"port": None},
    }  # fmt: skip
    assert json.loads(succeeds("show", path, "--json")) == shown


def test_what_is_shown_is_the_same_configuration(write):
    path = write(EXAMPLE.read_text())
    shown = succeeds("show", path)
    assert config.load(write(shown)) == config.load(EXAMPLE)
    assert succeeds("show", write(shown)) == shown


def test_limits_reach_the_core():
    parsed = config.parse(
        {**SMALL, "policy_limits": {"strikes": 3, "soft_ms": 20, "hard_s": 0.5}}, where=""
    )
    assert parsed.policy_limits.limits() == Limits(3, 0.02, 0.5)
    assert config.parse(SMALL, where="").policy_limits.limits() == Limits()


def test_limits_reach_the_policies_of_a_worker():
    from fluxmoe.backends.budget import KVNeed
    from fluxmoe.backends.runtime import Runtime
    from fluxmoe.core.types import Geometry
    from tests.core.rig import PAGE_CLASS, host_store

    geometry = Geometry(2, 4)
    settings = {"memory": {"budget": "auto"}, "policy_limits": {"strikes": 3, "hard_s": 0.5}}
    parsed = config.parse(settings, where="").resolved(1 << 20)
    runtime = Runtime(
        parsed,
        plugins.load().policies(parsed),
        geometry,
        PAGE_CLASS,
        host_store(geometry),
        KVNeed(4096, 4096, "a test"),
    )
    try:
        for guard in (runtime.eviction, runtime.prefetch):
            assert guard.limits == Limits(strikes=3, hard_s=0.5)
    finally:
        runtime.close()


def test_a_preset_chooses_what_is_not_said():
    paper = config.parse({**SMALL, "preset": "paper"}, where="")
    assert paper.eviction == {"kind": "immediate"}
    assert paper.prefetch == {"kind": "next-layer", "depth": 1}
    assert paper.arbitration == {"kind": "rho"}
    mixed = config.parse({**SMALL, "preset": "paper", "eviction": "lru"}, where="")
    assert (mixed.eviction["kind"], mixed.arbitration["kind"]) == ("lru", "rho")
    # vLLM's processes get the same configuration.
    dumped = mixed.model_dump(mode="json", exclude_defaults=True)
    assert config.parse(dumped, where="") == mixed
    with pytest.raises(ConfigError, match="preset"):
        config.parse({**SMALL, "preset": "papre"}, where="")


# --- the committed files -------------------------------------------------------------------------


def test_the_committed_schema_is_current():
    printed = succeeds("schema")
    assert printed == SCHEMA.read_text(), "fluxmoe config schema > docs/fluxmoe.schema.json"


def test_the_schema_describes_every_key_at_the_top():
    described = json.loads(SCHEMA.read_text())["properties"]
    assert list(described) == list(config.Config.model_fields)


def test_the_example_is_checked_complete_and_tells_the_defaults(monkeypatch):
    free_memory(monkeypatch, 1 << 36)  # because the example is for a larger machine
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "it will be looked up on the Hub" in succeeds("check", EXAMPLE)
    given = yaml.safe_load(EXAMPLE.read_text())
    assert list(given) and set(given) == set(config.Config.model_fields)
    bare = config.parse({"memory": {"budget": given["memory"]["budget"]}}, where="")
    without = {"model", "vllm"}
    assert config.load(EXAMPLE).model_dump(exclude=without) == bare.model_dump(exclude=without)


def test_editors_accept_what_fluxmoe_accepts_and_little_else(write):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert validator.is_valid(yaml.safe_load(EXAMPLE.read_text()))
    assert validator.is_valid(json.loads(succeeds("show", EXAMPLE, "--json")))
    assert validator.is_valid({"memory": {"budget": 5, "kv": {"max": "2 GB"}},
                               "eviction": {"kind": "lfru", "recency": 1}})  # fmt: skip
    for case in ("unknown key", "unknown key below", "missing", "missing below", "no size",
                 "a bound", "banks", "preset", "store", "threads", "seed", "strikes"):  # fmt: skip
        assert not validator.is_valid(BAD[case][0]), case
