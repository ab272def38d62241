"""Configurations: all problems at once, suggested keys, and relative paths (B6, B7)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from fluxmoe import config, plugins
from fluxmoe.backends.vllm.preflight import checks
from fluxmoe.backends.vllm.server import launch
from fluxmoe.config.schema import Config, HandLimits
from fluxmoe.errors import ConfigError, FluxMoEError, PluginLoadError
from fluxmoe.findings import Findings
from fluxmoe.testing import checkpoints
from tests.commandline import here

SMALL = {"memory": {"budget": "1GiB"}}


def said(data: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(data, where="")
    return [error.text for error in caught.value.problems()]


# --- B6 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        ({"memory": {"budgt": 1}}, "unknown key 'memory.budgt'; did you mean 'budget'?"),
        ({"mem": {"budget": 1}}, "unknown key 'mem'; did you mean 'memory'?"),
        ({**SMALL, "evict": "lru"}, "unknown key 'evict'; did you mean 'eviction'?"),
        ({"memory": {"budget": 1, "kv": {"mx": 1}}},
         "unknown key 'memory.kv.mx'; did you mean 'max'?"),
        ({**SMALL, "policy_limits": {"strike": 1}},
         "unknown key 'policy_limits.strike'; did you mean 'strikes'?"),
        ({**SMALL, "preset": "papr"},
         "preset: it must be 'default', 'paper' or 'off', not 'papr'; did you mean 'paper'?"),
        ({**SMALL, "stores": [{"kind": "fil", "path": "x"}]},
         "stores.0.kind: it must be 'host' or 'file', not 'fil'; did you mean 'file'?"),
        # Only keys of this kind of store are suggested; for a dissimilar key, no key is suggested.
        ({**SMALL, "stores": [{"kind": "host", "direct": True}]},
         "unknown key 'stores.0.direct'; remove it; known here: codec, kind, limit"),
        ({"memory": {"budget": 1, "zzz": 1}},
         "unknown key 'memory.zzz'; remove it; known here: banks, budget, experts, frame, kv"),
    ],
)  # fmt: skip
def test_b6_an_unknown_key_is_that_and_not_its_missing_neighbour(data, finding):
    assert said(data) == [finding]


def test_b6_a_key_that_is_missing_beside_an_unknown_one_is_reported_too():
    assert said({"memory": {"zzz": 1}})[1:] == ["'memory.budget' is missing; add it"]
    assert said({"memory": {"budget": 1}, "stores": [{"kind": "file", "pth": "x"}]}) == [
        "unknown key 'stores.0.pth'; did you mean 'path'?"
    ]


def test_the_default_folder_of_page_files_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("memory: {budget: 1MiB}\nstores: [{kind: file}]")
    (store,) = config.load(tmp_path / "c.yaml").stores
    assert store.folder == tmp_path / "fluxmoe" / "pages"


def test_b6_all_problems_at_once(tmp_path):
    data = {"memory": {"budget": "50%", "bank": 2}, "seed": "x", "copy_threads": -1, "evict": "lru"}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(data))
    done = here("config", "check", path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and all(line.startswith("error[FM101]: ") for line in lines)
    for at, word in enumerate(
        ["memory.bank'", "'evict'", "budget: not", "copy_threads: ", "seed: "]
    ):
        assert sum(word in line for line in lines) == 1, (at, word)
    assert len(lines) == 5


def test_b6_all_policies_codecs_and_options_at_once():
    parsed = config.parse(
        {**SMALL, "eviction": "lruu", "prefetch": {"kind": "next-layer", "dpth": 1, "x": 2},
         "arbitration": "rhoo", "stores": [{"kind": "host", "codec": "fixed"}]}, where="",
    )  # fmt: skip
    registry = plugins.load()
    with pytest.raises(FluxMoEError) as caught:
        registry.policies(parsed)
    errors = caught.value.problems()
    assert [(error.code, error.what) for error in errors] == [
        ("FM201", "unknown eviction policy 'lruu'"), ("FM101", "unknown option 'dpth'"),
        ("FM101", "unknown option 'x'"), ("FM201", "unknown arbitration policy 'rhoo'"),
        ("FM306", "unknown codec 'fixed'"),
    ]  # fmt: skip
    meant = ["'lru'", "'depth'", "", "'rho'", "'fixed4'"]
    assert all(word in error.fix for word, error in zip(meant, errors, strict=True))


def test_b6_all_plugins_at_once_and_hooks_that_were_meant(tmp_path):
    (tmp_path / "a.py").write_text(
        "import fluxmoe\n@fluxmoe.hookimpl\ndef fluxmoe_register_policie(register): pass\n"
    )
    with pytest.raises(PluginLoadError) as caught:
        plugins.load([str(tmp_path / "a.py"), str(tmp_path / "none.py")])
    first, second = caught.value.problems()
    assert first.what == "unknown hook 'fluxmoe_register_policie'"
    assert first.fix.startswith("did you mean 'fluxmoe_register_policies'?; the hooks: ")
    assert second.what == "no such file"


def test_b6_keys_of_every_map_are_known():
    """Check that a misspelling of any key in any map is recognised."""
    data = json.loads(Config(memory={"budget": 1}).model_dump_json())  # type: ignore[arg-type]
    data["stores"] = [{"kind": "file", "path": "x", "limit": 1}, {"kind": "host"}]
    data["vllm"], free = {}, ("eviction", "prefetch", "arbitration", "codec", "vllm")

    def maps(value, place):
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield from maps(item, (*place, index))
        if isinstance(value, dict) and not set(place) & set(free):
            yield place, value
            for key, item in value.items():
                yield from maps(item, (*place, key))

    tried = 0
    for place, keys in maps(data, ()):
        for key in set(keys) - {"kind", "path", "memory", "budget"}:
            wrong = json.loads(json.dumps(data))
            inner = wrong
            for part in place:
                inner = inner[part]
            inner[f"{key}_"] = inner.pop(key)
            field = ".".join(map(str, (*place, f"{key}_")))
            assert f"unknown key {field!r}; did you mean {key!r}?" in said(wrong)[0]
            tried += 1
    assert tried > 20


def test_b6_limits_by_hand():
    with pytest.raises(ConfigError, match=r"'kv\.mix'.*did you mean 'min'"):
        config.parse_limits({"kv": {"mix": 1}}, where="")
    assert isinstance(config.parse_limits({}, where=""), HandLimits)


# --- B7 -------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Make a folder with a configuration and all its files; the working directory is elsewhere."""
    folder, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    elsewhere.mkdir()
    checkpoints.write(folder / "model", "mixtral", num_hidden_layers=1)
    (folder / "mru.py").write_text(
        "import fluxmoe\n"
        "class Mru(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages): return -view.last_use[pages]\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register): register('mru', Mru)\n"
    )
    monkeypatch.chdir(elsewhere)
    return folder


def located(folder: Path, **data: object) -> Config:
    (folder / "c.yaml").write_text(yaml.safe_dump({**SMALL, **data}))
    return config.load(Path(os.path.relpath(folder / "c.yaml")))


def test_b7_paths_are_relative_to_the_file(place):
    loaded = located(
        place, model="model", plugins=["mru.py", "./mru.py", "package.module"], eviction="mru",
        stores=[{"kind": "host", "limit": 1}, {"kind": "file", "path": "pages"}],
        vllm={"chat-template": "chat.jinja"},
    )  # fmt: skip
    assert loaded.model is not None and Path(loaded.model).is_absolute()
    assert Path(loaded.model).samefile(place / "model")
    files = [Path(name) for name in loaded.plugins[:2]]
    assert all(file.is_absolute() and file.samefile(place / "mru.py") for file in files)
    assert loaded.plugins[2] == "package.module"
    store = loaded.stores[1]
    assert store.kind == "file" and Path(store.path).parent.samefile(place)
    assert loaded.vllm == {"chat-template": "chat.jinja", "served-model-name": "model"}


def test_b7_absolute_paths_and_the_home_folder_stay(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    loaded = located(
        place, model="~/model", plugins=[str(place / "mru.py")],
        stores=[{"kind": "file", "path": "/nowhere/pages"}],
    )  # fmt: skip
    assert loaded.model == str(place / "model") and loaded.plugins == [str(place / "mru.py")]
    for key in "served-model-name", "served_model_name":
        assert located(place, model="model", vllm={key: "m"}).vllm == {key: "m"}
    assert loaded.stores[0].kind == "file" and loaded.stores[0].path == "/nowhere/pages"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "organisation/no.folder"])
def test_b7_a_name_without_a_folder_stays_a_name_on_the_hub(place, name):
    assert located(place, model=name).model == name


@pytest.mark.parametrize("name", ["qwen", "./none", "../none", "a/b/c", "two words"])
def test_b7_a_path_without_a_folder_is_refused_as_an_absolute_one(place, name):
    loaded = located(place, model=name)
    assert loaded.model == f"{Path(os.path.relpath(place)).absolute()}/{name.removeprefix('./')}"


def test_b7_defaults_stay_defaults(place):
    loaded = located(place)
    assert not loaded.model_fields_set & {"model", "stores", "plugins"}
    assert loaded == config.parse(SMALL, where="")


def test_b7_commands_show_absolute_paths(place):
    (place / "c.yaml").write_text(
        yaml.safe_dump({**SMALL, "model": "model", "plugins": ["mru.py"], "eviction": "mru"})
    )
    words = launch.arguments(checks.resolved(config.load(place / "c.yaml")))
    assert words[words.index("--model") + 1] == str(place / "model")
    assert words[words.index("--served-model-name") + 1] == "model"
    settings = json.loads(words[words.index("--additional-config") + 1])["fluxmoe"]
    assert settings["plugins"] == [str(place / "mru.py")]
    assert here("config", "check", place / "c.yaml").returncode == 0
    (place / "mru.py").unlink()
    done = here("config", "check", place / "c.yaml")
    assert done.stderr == f"error[FM202]: no such file; plugin {place / 'mru.py'}\n"


@pytest.mark.parametrize("name", ["mru.py", ["mru.py"]])
def test_b5_one_plugin_needs_no_list(place, name, monkeypatch):
    monkeypatch.chdir(place)
    assert located(place, plugins=name).plugins == [str(place / "mru.py")]
    assert "mru" in plugins.load(name).names("eviction")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("on: 1\nmemory: {budget: 1GiB}\n", "the key on is not text: put it in quotes"),
        ("memory: {budget: 1GiB, 2026-11-30: 1}\n", "is not text"),
        ("seed: 2026-99-99\n", "not valid YAML"),
        ("seed: !!int x\n", "not valid YAML"),
        ("seed: 0b_\n", "not valid YAML"),
        ("seed: !!bool x\n", "not valid YAML"),
        ("seed: !!int ''\n", "not valid YAML"),
        ("memory: !!map [a]\n", "not valid YAML"),
        ("a: \0\n", "not valid YAML"),
        ("model: " + 3000 * "[", "nested too deeply"),
        ("seed: -1\nmemory: {budget: 1GiB}\n", "seed"),
    ],
)
def test_values_that_the_yaml_reader_cannot_make(tmp_path: Path, text: str, message: str) -> None:
    path, found = tmp_path / "c.yaml", Findings()
    path.write_text(text)
    config.load_most(path, found)
    assert [error.code for error in found.errors] == ["FM101"]
    assert message in found.errors[0].text and "\n" not in found.errors[0].text


def test_keys_that_are_not_text_do_not_hang() -> None:
    found = Findings()
    config.parse_most({True: 1, "memory": {"budget": "1GiB"}}, found, where="x")
    assert found.errors


def test_names_that_are_too_long_are_refused(tmp_path: Path) -> None:
    data = {**SMALL, "model": "m" * 5000, "stores": [{"kind": "file", "path": "s" * 300}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    done = here("config", "check", tmp_path / "c.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "File name too long; stores.0.path" in done.stderr and "FM406" in done.stderr


def test_a_host_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not a host: .*; vllm\.host"):
        checks._require_open("a\0b", 8000)


@pytest.mark.parametrize("length", [".inf", "1e999k"])
def test_a_length_that_is_no_number_is_left_to_vllm(tmp_path: Path, length: str) -> None:
    model = checkpoints.write(tmp_path / "model")
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {model}\nmemory: {{budget: 16MiB}}\nvllm: {{max-model-len: {length}}}")
    done = here("config", "check", path)
    assert (done.returncode, done.stderr) == (0, "")
