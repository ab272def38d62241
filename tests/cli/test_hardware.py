"""The hardware profile for ``plan``: by default this machine's, which is measured once (C6)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxmoe.cli.shared import hardware
from fluxmoe.demo.model import SHIPPED
from fluxmoe.sim.hardware import load, save
from fluxmoe.trace import shipped
from tests.commandline import command, fails, here, succeeds

PLAN = "plan", SHIPPED, "--memory", "14MiB", "--context", "128"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty folder for the user's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_c6_this_machine_is_measured_once(cache):
    first = command(*PLAN, "--json")
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith("note: measuring this machine, once")
    [kept] = cache.rglob("*.yaml")
    assert load(kept).load_gbps > 0
    again = command(*PLAN, "--json")
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert json.loads(first.stdout)["hardware"] == "this-machine"


def test_c6_a_kept_measurement_is_used_and_named(cache):
    kept = load("laptop-nvme").model_copy(update={"name": "this-machine", "description": "kept"})
    path = hardware._path()
    path.parent.mkdir(parents=True)
    save(kept, path)
    done = here(*PLAN)
    assert done.stderr == "" and "Hardware: this-machine: kept\n" in done.stdout
    named = succeeds(*PLAN, "--hardware", "rtx4090-pcie4")
    assert "Hardware: rtx4090-pcie4: RTX 4090" in named
    run = "simulate", shipped.path("decode-1"), "--policy", "lru", "--capacity", "50%", "--json"
    [result] = json.loads(succeeds(*run, "--hardware", "this-machine"))
    assert result["hardware"] == "this-machine"
    [line] = [c for c in json.loads(succeeds("doctor", "--quick", "--json"))["checks"]
              if c["name"] == "hardware profile"]  # fmt: skip
    assert line["status"] == "ok" and "kept" in line["found"]


def test_c6_without_torch_a_named_profile_is_used_and_that_is_said(cache, monkeypatch):
    found = hardware.importlib.util.find_spec
    monkeypatch.setattr(
        hardware.importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    done = here(*PLAN)
    assert done.returncode == 0
    assert "not installed: the profile laptop-nvme is used; pip install" in done.stderr
    assert "Hardware: laptop-nvme: A laptop's CPU" in done.stdout
    assert list(cache.iterdir()) == []


def test_c6_a_measurement_that_cannot_be_kept_or_read_is_made_again(cache, monkeypatch):
    profile = load("laptop-nvme")
    monkeypatch.setattr(hardware, "_measure", lambda: profile)
    path = hardware._path()
    path.parent.mkdir(parents=True)
    path.write_text("load_gbps: fast")
    assert hardware.profile_of("this-machine") == profile
    assert hardware.measured() == profile  # replaced
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file instead of a folder
    done = here(*PLAN)
    assert done.returncode == 0 and "note: the measurement cannot be kept: " in done.stderr


def test_c6_no_card_is_the_default():
    from tests.docs.commands import verbs

    [plan] = [command for verb, command in verbs() if verb == "plan"]
    [option] = [each for each in plan.params if each.name == "hardware"]
    assert option.default == hardware.HERE
    fails(*PLAN, "--hardware", "abacus", code="FM101", message="unknown hardware profile 'abacus'")


def test_c15_a_recommended_split_below_one_token_s_pages_is_remarked_on(tmp_path):
    # 16 layers of 8 experts, of which a token uses 6: a cycle of 96 pages, and little memory.
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 16, "hidden_size": 512,
              "vocab_size": 1000, "num_experts": 8, "num_experts_per_tok": 6,
              "moe_intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4,
              "head_dim": 64, "dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = "plan", tmp_path, "--context", 64, "--requests", 1, "--hardware", "laptop-nvme"
    few, many = (succeeds(*run, "--memory", memory) for memory in ("60MiB", "180MiB"))
    assert "slots are fewer than the 96 pages of one token" in few
    assert "slots are fewer" not in many


@pytest.mark.parametrize("text", ["2026-99-99", "!!int x", 3000 * "[", "a: \0", "a: 1\na: 2", "["])
def test_profiles_that_yaml_cannot_read(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    fails(
        *PLAN,
        "--hardware",
        path,
        code="FM101",
        message="(not valid YAML|the document is nested too deeply)",
    )
