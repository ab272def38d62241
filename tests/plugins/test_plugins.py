"""Plugins are found, loaded and rejected, with errors that name the plugin and the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

import fluxmoe
from fluxmoe import plugins
from fluxmoe.errors import ConfigError, PluginLoadError, UnknownPolicyError
from tests.plugins.rig import install, write

BUILT_IN = {
    "eviction": ["belady", "immediate", "lfru", "lfu", "lru", "next-use", "s3-fifo"],
    "prefetch": ["gate", "markov", "next-layer", "none"],
    "arbitration": ["fixed", "kv-first", "marginal", "rho"],
}


# --- without plugins ------------------------------------------------------------------------------


def test_built_in_policies_come_through_the_same_door():
    registry = plugins.load()
    assert {kind: registry.names(kind) for kind in BUILT_IN} == BUILT_IN
    assert {entry.plugin for entry in registry} == {"fluxmoe"}
    assert [(e.kind, e.name) for e in registry] == sorted((e.kind, e.name) for e in registry)
    assert all(entry.summary.endswith((".", ").")) for entry in registry)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_built_in_policies_can_be_made_by_name(kind):
    registry = plugins.load()
    for name in BUILT_IN[kind]:
        assert isinstance(registry.create(kind, name), registry.get(kind, name).factory)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_an_unknown_policy_lists_the_known(kind):
    with pytest.raises(UnknownPolicyError) as info:
        plugins.load().create(kind, "lruu")
    assert info.value.what == f"unknown {kind} policy 'lruu'"
    listed = f"known {kind} policies: {', '.join(BUILT_IN[kind])}"
    assert info.value.fix == ("did you mean 'lru'?; " if kind == "eviction" else "") + listed


def test_registries_do_not_share_policies(tmp_path):
    path = write(tmp_path / "mru.py")
    assert "mru" in plugins.load([path]).names("eviction")
    assert "mru" not in plugins.load().names("eviction")
    assert "mru" in plugins.load([path]).names("eviction")


# --- files and modules ---------------------------------------------------------------------------


def test_a_file_is_a_plugin(tmp_path):
    path = write(tmp_path / "my policy.py")
    registry = plugins.load([path])
    found = registry.get("eviction", "mru")
    assert (found.plugin, found.summary) == (path, "Evict the page that was used last.")
    assert isinstance(registry.create("eviction", "mru"), fluxmoe.EvictionPolicy)


def test_two_files_of_the_same_name_do_not_collide(tmp_path):
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "policy.py", name=name))
    assert {"one", "two"} <= set(plugins.load(paths).names("eviction"))


def test_a_module_name_is_a_plugin(site):
    (site / "pony").mkdir()
    write(site / "pony/__init__.py", "")
    write(site / "pony/policies.py")
    assert plugins.load(["pony.policies"]).get("eviction", "mru").plugin == "pony.policies"


@pytest.mark.parametrize("kind", ["file", "module"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('no GPU here')", "RuntimeError: no GPU here"),
    ],
)
def test_a_plugin_that_fails_to_import_is_named(site, kind, text, message):
    name = write(site / "pony.py", text)
    name = name if kind == "file" else "pony"
    loaded = set(sys.modules)
    with pytest.raises(PluginLoadError) as info:
        plugins.load([name])
    assert info.value.where == f"plugin {name}"
    assert info.value.what.startswith("cannot import the plugin: ")
    assert message in info.value.what
    assert not [m for m in set(sys.modules) - loaded if "pony" in m]  # nothing half-loaded remains


@pytest.mark.parametrize("name", ["nowhere.py", "no/such/file.py", "./dir", "no_such_module_here"])
def test_a_plugin_that_is_not_there_is_named(name):
    with pytest.raises(PluginLoadError) as info:
        plugins.load([name])
    assert info.value.where == f"plugin {name}"


def test_a_file_that_is_not_python_is_refused(tmp_path):
    path = write(tmp_path / "policy.yaml", "a: 1")
    with pytest.raises(PluginLoadError, match="not a Python file"):
        plugins.load([path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "no hook was found"),
        ("def fluxmoe_register_policies(register): pass", "no hook was found"),  # not decorated
        (
            "import fluxmoe\n@fluxmoe.hookimpl\ndef fluxmoe_register_polices(register): pass",
            "unknown hook 'fluxmoe_register_polices'",
        ),
        (
            "import fluxmoe\n@fluxmoe.hookimpl\ndef fluxmoe_register_policies(registry): pass",
            "registry",
        ),
        (
            "import fluxmoe\n@fluxmoe.hookimpl\ndef fluxmoe_register_policies(register): 1 / 0",
            "fluxmoe_register_policies raised ZeroDivisionError",
        ),
    ],
)
def test_a_plugin_without_a_usable_hook_is_refused(tmp_path, text, message):
    path = write(tmp_path / "policy.py", text)
    with pytest.raises(PluginLoadError) as info:
        plugins.load([path])
    assert message in info.value.what
    assert info.value.where == f"plugin {path}"


# --- valid and invalid registrations -------------------------------------------------------------


class Plugin:
    """A plugin object that calls ``register`` with the test's arguments."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    @fluxmoe.hookimpl
    def fluxmoe_register_policies(self, register):
        register(*self.args, **self.kwargs)


class Good(fluxmoe.EvictionPolicy):
    def __init__(self, weight: float = 1.0, mode: str = "fast"):
        self.weight, self.mode = weight, mode

    def score(self, view, pages):
        return pages * self.weight


class Selects(fluxmoe.EvictionPolicy):
    def select(self, view, pages, n):
        return pages[:n]


class HasKernel(fluxmoe.EvictionPolicy):
    @staticmethod
    def score_kernel(last_use, use_count, loaded_at, event, page):
        return 1.0


class DecidesNothing(fluxmoe.EvictionPolicy):
    def on_load(self, view, pages):
        pass


def registry_with(*args, **kwargs) -> plugins.Registry:
    registry = plugins.load()
    registry.add(Plugin(*args, **kwargs), "pony")
    return registry


@pytest.mark.parametrize("policy", [Good, Selects, HasKernel])
def test_score_select_or_kernel_makes_a_policy(policy):
    assert isinstance(registry_with("good", policy).create("eviction", "good"), policy)


@pytest.mark.parametrize(
    ("args", "message", "fix"),
    [
        (("x", int), "'x' is not a policy class: <class 'int'>", "fluxmoe.EvictionPolicy"),
        (("x", lambda: Good()), "'x' is not a policy class", "fluxmoe.EvictionPolicy"),
        (("x", Good()), "'x' is not a policy class", "fluxmoe.EvictionPolicy"),
        (("x", DecidesNothing), "'x' cannot choose victims", "define score"),
        ((7, Good), "not a valid name: 7", ""),
        (("", Good), "not a valid name: ''", ""),
        (("lru", Good), "eviction policy 'lru' is already registered by fluxmoe", "another name"),
        (("x",), "fluxmoe_register_policies raised TypeError", ""),
    ],
)
def test_what_cannot_be_a_policy_is_refused(args, message, fix):
    with pytest.raises(PluginLoadError) as info:
        registry_with(*args)
    assert message in info.value.what
    assert fix in info.value.fix
    assert info.value.where == "plugin pony"


def test_one_name_may_stand_for_a_policy_of_each_kind():
    class Fetch(fluxmoe.PrefetchPolicy):
        def propose(self, view, access):
            return []

    registry = registry_with("lru", Fetch)
    assert registry.get("prefetch", "lru").plugin == "pony"
    assert registry.get("eviction", "lru").plugin == "fluxmoe"


def test_what_is_named_twice_is_loaded_once(tmp_path):
    path = write(tmp_path / "mru.py")
    found = [p.name for p in plugins.load([path, path]).plugins if p.origin == "named"]
    assert found == [path]


def test_two_plugins_of_one_name_are_refused():
    registry = registry_with("one", Good)
    with pytest.raises(PluginLoadError, match="pony"):
        registry.add(Plugin("two", Good), "pony")


def test_a_policy_that_cannot_be_made_names_its_plugin():
    class Fails(Good):
        def __init__(self):
            raise OSError("no table")

    with pytest.raises(PluginLoadError) as info:
        registry_with("fails", Fails).create("eviction", "fails")
    assert info.value.what == "eviction policy 'fails' cannot be created: OSError: no table"
    assert info.value.where == "plugin pony"


# --- options -------------------------------------------------------------------------------------


class Options(BaseModel):
    weight: float = Field(default=2.0, ge=0)
    mode: str = "slow"


class Aliased(BaseModel):
    weight: float = Field(default=2.0, validation_alias="gewicht")


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Exclusive(Options):
    def model_post_init(self, context):
        if self.mode == "none" and self.weight:
            raise ValueError("mode none has no weight")


def test_options_are_validated_and_passed_as_keywords():
    registry = registry_with("good", Good, Options)
    assert vars(registry.create("eviction", "good")) == {"weight": 2.0, "mode": "slow"}
    made = registry.create("eviction", {"kind": "good", "weight": "3.5"})
    assert vars(made) == {"weight": 3.5, "mode": "slow"}
    built_in = registry.create("prefetch", {"kind": "next-layer", "depth": 3})
    assert built_in.lead == 3


def test_aliases_and_open_models_work():
    made = registry_with("g", Good, Aliased).create("eviction", {"kind": "g", "gewicht": 5})
    assert made.weight == 5
    made = registry_with("g", Good, Open).create("eviction", {"kind": "g", "mode": "any"})
    assert made.mode == "any"


def test_an_unknown_option_is_refused_even_by_a_model_that_would_ignore_it():
    with pytest.raises(ConfigError) as info:
        registry_with("good", Good, Options).create("eviction", {"kind": "good", "wieght": 3})
    assert info.value.what == "unknown option 'wieght'"
    assert info.value.where == "eviction 'good'"
    assert info.value.fix == "did you mean 'weight'?; valid options: mode, weight"


def test_a_policy_without_options_takes_none():
    with pytest.raises(ConfigError, match="unknown option 'depth'") as info:
        plugins.load().create("eviction", {"kind": "lru", "depth": 3})
    assert "no options" in info.value.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "weight: Input should be greater than or equal to 0, not -1"),
        ({"weight": "heavy"}, "weight: Input should be a valid number"),
        ({"mode": None}, "mode: Input should be a valid string"),
    ],
)
def test_a_bad_value_names_option_and_value(options, message):
    with pytest.raises(ConfigError) as info:
        registry_with("good", Good, Options).create("eviction", {"kind": "good", **options})
    assert message in info.value.what
    assert repr(next(iter(options.values()))) in info.value.what


def test_a_refusal_of_the_whole_model_reads_well():
    registry = registry_with("good", Good, Exclusive)
    with pytest.raises(ConfigError) as info:
        registry.create("eviction", {"kind": "good", "mode": "none"})
    assert info.value.what.startswith("mode none has no weight")


@pytest.mark.parametrize("spec", [{}, {"depth": 1}, {"kind": 3}])
def test_a_specification_without_a_name_is_refused(spec):
    with pytest.raises(ConfigError, match="no prefetch policy in") as info:
        plugins.load().create("prefetch", spec)
    assert info.value.where == "prefetch"


def test_a_specification_is_not_changed_by_using_it():
    spec = {"kind": "next-layer", "depth": 2}
    plugins.load().create("prefetch", spec)
    assert spec == {"kind": "next-layer", "depth": 2}


# --- entry points and the allow-list -------------------------------------------------------------


@pytest.fixture
def installed(site, monkeypatch):
    """Install two distributions, one of which has two plugins."""
    for module in ("pony", "cart", "wheel"):
        write(site / f"{module}_policy.py", name=module)
    install(site, "fluxmoe-pony", {"pony": "pony_policy"})
    install(site, "fluxmoe-cart", {"the-cart": "cart_policy", "wheel": "wheel_policy"})
    monkeypatch.delenv("FLUXMOE_PLUGINS")
    return site


def extra(registry: plugins.Registry) -> dict[str, str]:
    return {r.name: r.plugin for r in registry if r.plugin != "fluxmoe"}


def test_installed_plugins_are_found_by_their_entry_points(installed):
    assert extra(plugins.load()) == {"pony": "pony", "cart": "the-cart", "wheel": "wheel"}


@pytest.mark.parametrize(
    ("allowed", "found"),
    [
        ("", []),
        (" , ", []),
        ("pony", ["pony"]),
        ("fluxmoe-pony", ["pony"]),
        ("fluxmoe-cart", ["cart", "wheel"]),
        (" wheel , pony ", ["pony", "wheel"]),
        ("Fluxmoe_Cart,fluxmoe-cart", ["cart", "wheel"]),
    ],
)
def test_the_allow_list_takes_distributions_and_entry_points(
    installed, monkeypatch, allowed, found
):
    monkeypatch.setenv("FLUXMOE_PLUGINS", allowed)
    assert sorted(extra(plugins.load())) == found


def test_a_plugin_that_is_not_allowed_is_not_even_imported(installed, monkeypatch):
    write(installed / "pony_policy.py", "raise SystemError('I ran')")
    monkeypatch.setenv("FLUXMOE_PLUGINS", "wheel")
    assert sorted(extra(plugins.load())) == ["wheel"]


def test_an_unknown_name_in_the_allow_list_is_an_error(installed, monkeypatch):
    monkeypatch.setenv("FLUXMOE_PLUGINS", "pony,poni")
    with pytest.raises(PluginLoadError) as info:
        plugins.load()
    assert info.value.what == "no installed plugin is named 'poni'"
    assert info.value.where == "FLUXMOE_PLUGINS"
    assert info.value.fix == "installed: pony, the-cart, wheel"


def test_the_allow_list_does_not_concern_plugins_that_are_named_explicitly(
    installed, monkeypatch, tmp_path
):
    monkeypatch.setenv("FLUXMOE_PLUGINS", "")
    path = write(tmp_path / "mine.py", name="mine")
    assert extra(plugins.load([path])) == {"mine": path}


def test_a_file_cannot_take_the_name_of_an_installed_policy(installed, tmp_path):
    path = write(tmp_path / "mine.py", name="pony")
    with pytest.raises(PluginLoadError) as info:
        plugins.load([path])
    assert "'pony' is already registered by pony" in info.value.what
    assert info.value.where == f"plugin {path}"


def test_an_entry_point_works_in_a_fresh_process(installed):
    code = "from fluxmoe import plugins; print(plugins.load().names('eviction'))"
    root = Path(fluxmoe.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{root}:{installed}", "FLUXMOE_PLUGINS": "pony"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "pony" in done.stdout
    assert "wheel" not in done.stdout


def test_c4_a_policy_and_its_package(tmp_path):
    class Mine(fluxmoe.EvictionPolicy):
        def score(self, view, pages):
            return view.last_use[pages]

    registry = plugins.load()
    assert registry.source("eviction", "lru") == f"lru (FluxMoE {fluxmoe.__version__})"
    options = {"kind": "next-layer", "depth": 2}
    assert registry.source("prefetch", options) == f"next-layer (FluxMoE {fluxmoe.__version__})"
    for spec in (Mine, Mine()):
        assert registry.source("eviction", spec) == f"Mine ({__name__})"
    with pytest.raises(UnknownPolicyError):
        registry.source("eviction", "nonsense")
