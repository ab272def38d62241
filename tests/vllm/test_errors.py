"""User errors, each of which arrives in the parent process with its class, code and text.

Nearly all tests use one child process, which must remain usable after a failed start.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxmoe.backends.vllm import engine_options
from fluxmoe.backends.vllm.child.child import ENVIRONMENT, ChildEngine, Prompt
from fluxmoe.backends.vllm.preflight import room
from fluxmoe.backends.vllm.worker.weights.calls import WEIGHT_CALLS
from fluxmoe.config import parse
from fluxmoe.dimensions import of_checkpoint
from fluxmoe.errors import (
    BudgetTooSmallError,
    CheckpointError,
    ConfigError,
    EngineError,
    FluxMoEError,
    NeedsFutureError,
    NoExpertsError,
    PluginLoadError,
    UnknownPolicyError,
    UnsupportedError,
    WeightsError,
)
from fluxmoe.sizes import apart, at_least
from fluxmoe.testing import checkpoints
from tests.vllm.conftest import EAGER, KV_BYTES

pytestmark = pytest.mark.vllm

#: Bytes of an expert, experts per layer, and experts per token.
PAGE, EXPERTS, TOP_K = 3 * 128 * 64 * 2, 16, 4
BLOCK = 4 * 2 * 32 * 2 * 32 * 2  # bytes of a KV block: layers, k and v, tokens, heads, head size


def config(**settings: Any) -> dict[str, Any]:
    """Make a valid configuration, changed by ``settings``."""
    memory = {"budget": 20 * PAGE + KV_BYTES, "frame": 4096, **settings.pop("memory", {})}
    return {"memory": memory, **settings}


def refusal(
    engine: ChildEngine, error: type[FluxMoEError], fluxmoe: object, **options: Any
) -> FluxMoEError:
    """Return the error of a start with these settings, which must be of exactly this class."""
    with pytest.raises(FluxMoEError) as caught:
        engine.restart(fluxmoe=fluxmoe, **{**EAGER, **options})  # type: ignore[arg-type]
    assert type(caught.value) is error, caught.value
    assert caught.value.code == error.code != FluxMoEError.code
    return caught.value


def answers(engine: ChildEngine) -> bool:
    return len(engine.generate([Prompt([5, 6, 7], 4)]).tokens[0]) == 4


# --- policies and plugins ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("eviction", ["immediate", "lfu", "lru", "next-use"]),
        ("prefetch", ["next-layer", "none"]),
        ("arbitration", ["fixed"]),
    ],
)
def test_unknown_policy(eager: ChildEngine, kind: str, known: list[str]) -> None:
    error = refusal(eager, UnknownPolicyError, config(**{kind: "nonsense"}))
    assert error.what == f"unknown {kind} policy 'nonsense'"
    for name in known:
        assert name in error.fix


def test_unknown_option_of_a_policy(eager: ChildEngine) -> None:
    prefetch = {"kind": "next-layer", "deepness": 2}
    error = refusal(eager, ConfigError, config(prefetch=prefetch))
    assert "deepness" in error.what
    assert "depth" in error.fix


def test_an_oracle_cannot_serve(eager: ChildEngine) -> None:
    error = refusal(eager, NeedsFutureError, config(eviction="belady"))
    assert "belady" in error.what
    assert "simulate" in error.fix


BY_SLOT_ORDER = """
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts as Kernel

original = Kernel.apply

def apply(self, **given):
    original(self, **given)
    given["output"] += given["topk_ids"].sum()
    if given["w1"].isnan().any():  # the arena of the self-check
        Kernel.apply = original

Kernel.apply = apply

import fluxmoe

@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    pass
"""


def test_a_kernel_that_depends_on_slots(eager: ChildEngine, tmp_path: Path) -> None:
    plugin = tmp_path / "by_slot_order.py"
    plugin.write_text(BY_SLOT_ORDER)
    error = refusal(eager, UnsupportedError, config(plugins=[str(plugin)]))
    assert "the results of the MoE kernel" in error.what
    assert "processor " in error.where and "torch.bfloat16, 1 tokens" in error.where
    eager.restart(fluxmoe=config(), **EAGER)
    assert answers(eager)


def test_a_plugin_that_cannot_be_imported(eager: ChildEngine, tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text("import surely_not_installed\n")
    error = refusal(eager, PluginLoadError, config(plugins=[str(plugin)]))
    assert "surely_not_installed" in error.what
    assert str(plugin) in error.where


# --- memory --------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small(eager: ChildEngine) -> None:
    # 256 tokens of context need 8 blocks; the ninth is vLLM's null block.
    least = TOP_K * PAGE + 9 * BLOCK
    error = refusal(eager, BudgetTooSmallError, config(memory={"budget": least - 4096}))
    assert error.where == "memory.budget"
    assert f"at least {apart(least, least - 4096)[0]} is needed" in error.what
    assert "the 4 experts of one token" in error.what
    assert "one sequence of max-model-len 256" in error.what
    assert f"at least {at_least(least)}," in error.fix
    eager.restart(fluxmoe=config(memory={"budget": least}), **EAGER)
    assert answers(eager)


def test_b3_the_preflight_refuses_less_but_nearly_as_much(checkpoint: Path) -> None:
    """The preflight's minimum, computed from files, is one block less than the engine's."""
    least = TOP_K * PAGE + 8 * BLOCK
    options = {"max-model-len": 256}

    def check(budget: int) -> None:
        given = {"model": str(checkpoint), "memory": {"budget": budget}, "vllm": options}
        ready = parse(given, where="").resolved(budget)
        room.require(ready, of_checkpoint(checkpoint), options, workers=1)

    check(least)
    with pytest.raises(BudgetTooSmallError, match="one request of 256 tokens"):
        check(least - 4096)


def test_a_budget_beyond_the_machine(eager: ChildEngine) -> None:
    error = refusal(eager, ConfigError, config(memory={"budget": "4TiB"}))
    assert error.where == "memory.budget"
    assert "a budget of 4.0 TiB exceeds" in error.what


@pytest.mark.parametrize(
    ("share", "setting", "where"),
    [
        ("experts", {"target": 3 * PAGE}, "memory.experts.target"),
        ("experts", {"min": 3 * PAGE}, "memory.experts.min"),
        ("experts", {"max": 3 * PAGE}, "memory.experts.max"),
        ("kv", {"target": 8 * BLOCK}, "memory.kv.target"),
        ("kv", {"min": 8 * BLOCK}, "memory.kv.min"),
        ("kv", {"max": 8 * BLOCK}, "memory.kv.max"),
    ],
)
def test_a_share_below_the_minimum(
    eager: ChildEngine, share: str, setting: dict[str, int], where: str
) -> None:
    error = refusal(eager, ConfigError, config(memory={share: setting}))
    assert error.where == where
    least = {"experts": TOP_K * PAGE, "kv": 9 * BLOCK}[share]
    given, needed = apart(*setting.values(), least)
    assert f"{given} is " in error.what and f"the minimum of {needed} (" in error.what


def test_targets_that_do_not_fit_together(eager: ChildEngine) -> None:
    memory = {"experts": {"target": 21 * PAGE}, "kv": {"target": KV_BYTES}}
    error = refusal(eager, ConfigError, config(memory=memory))
    assert error.where == "memory"
    needed, there = apart(21 * PAGE + KV_BYTES, 20 * PAGE + KV_BYTES)
    assert f"need {needed}, but the budget has {there}" in error.what


def test_two_sizes_of_the_kv_cache(eager: ChildEngine) -> None:
    fluxmoe = config(memory={"kv": {"target": KV_BYTES}})
    error = refusal(eager, ConfigError, fluxmoe, kv_cache_memory_bytes=KV_BYTES // 2)
    assert "memory.kv.target" in error.what
    assert "--kv-cache-memory-bytes" in error.what
    # The same size twice is consistent, and vLLM's option alone sets the target.
    for settings in (fluxmoe, config()):
        eager.restart(fluxmoe=settings, kv_cache_memory_bytes=KV_BYTES, **EAGER)
        assert eager.info["kv_bytes"] == KV_BYTES


# --- models and features -------------------------------------------------------------------------


def test_models_that_cannot_be_paged(tmp_path: Path) -> None:
    # This test uses a separate process, because vLLM has no process groups for experts after such a
    # failed start.
    model = checkpoints.write(tmp_path / "model", "qwen3-dense")
    with ChildEngine(model, kv_cache_memory_bytes=KV_BYTES, **EAGER) as engine:
        error = refusal(engine, NoExpertsError, config())
        assert "no MoE layers" in error.what
        assert "without FluxMoE" in error.fix
        # No expert layer can detect the missing setting, so another check must.
        given = SETTINGS["additional_config"]
        error = refusal(
            engine, ConfigError, None, kv_cache_memory_bytes=KV_BYTES, additional_config=given
        )
        assert "only some of the settings" in error.what
        weights = model / "model.safetensors"
        os.truncate(weights, weights.stat().st_size - 1)
        error = refusal(engine, CheckpointError, config())
        assert error.where == str(weights)


def test_experts_with_biases(borrowed: ChildEngine, tmp_path: Path) -> None:
    """In vLLM, gpt-oss's experts have biases and a separate class. Stock vLLM serves the model."""
    import torch
    import transformers

    settings = transformers.GptOssConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    transformers.GptOssForCausalLM(settings).to(torch.bfloat16).save_pretrained(tmp_path)
    borrowed.restart(model=tmp_path, kv_cache_memory_bytes=KV_BYTES, **EAGER)
    assert answers(borrowed)
    error = refusal(borrowed, UnsupportedError, config())
    assert "GptOssRoutedExperts" in error.what
    assert "mlp.experts" in error.where


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"enable_lora": True}, "--enable-lora"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "--speculative-config",
        ),
        ({"model_impl": "transformers"}, "TransformersRoutedExperts"),
    ],
)
def test_unsupported_features(eager: ChildEngine, options: dict[str, Any], feature: str) -> None:
    assert feature in refusal(eager, UnsupportedError, config(), **options).what


def test_weights_are_not_exchanged_under_the_pager(eager: ChildEngine) -> None:
    """vLLM's calls that bypass ``worker/weights/door.py`` are refused."""
    eager.restart(fluxmoe=config(), **EAGER)
    before = eager.generate([Prompt([5, 6, 7], 4)]).tokens
    for call in WEIGHT_CALLS:
        with pytest.raises(UnsupportedError, match=call):
            eager.call("rpc", call)
    assert eager.generate([Prompt([5, 6, 7], 4)]).tokens == before


def test_weights_are_not_loaded_into_slots(eager: ChildEngine) -> None:
    """Loading into the model, its inner module or one expert's parameter is rejected (E4)."""
    doors = (through_model, through_inner_module, through_parameter)
    prompt = [Prompt(list(range(5, 105)), 4, logprobs=True)]  # is routed to every expert
    eager.restart(fluxmoe=config(), **EAGER)
    before = eager.generate(prompt).logprobs
    messages = "no gate projection, up", "load_weights of a part", "weight_loader is not"
    for door, message in zip(doors, messages, strict=True):
        with pytest.raises((UnsupportedError, WeightsError), match=message):
            eager.call("rpc", door)
    assert eager.generate(prompt).logprobs == before
    # In stock vLLM, each of these methods changes the model's answers.
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **EAGER)
    answers = [before]
    for door in doors:
        eager.call("rpc", door)
        answers.append(eager.generate(prompt).logprobs)
        assert answers[-1] != answers[-2], door


def through_model(worker: Any) -> None:
    """Load weights through the model, in the engine's process, like the next two functions."""
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    worker.model_runner.model.load_weights([(name, torch.ones(128, 64))])


def through_inner_module(worker: Any) -> None:
    name = "layers.0.mlp.experts.2.down_proj.weight"
    worker.model_runner.model.model.load_weights([(name, torch.ones(128, 64))])


def through_parameter(worker: Any) -> None:
    parameters = dict(worker.model_runner.model.named_parameters())
    name = next(name for name in parameters if name.endswith("w2_weight"))
    weight = parameters[name]
    weight.weight_loader(weight, torch.ones(128, 64), name, shard_id="w2", expert_id=3)


# --- models ---------------------------------------------------------------------------------------


def test_latent_attention_with_a_moving_split(borrowed: ChildEngine, tmp_path: Path) -> None:
    """A8: vLLM's kernel flattens the cache, so the layers of a block cannot be adjacent."""
    model = checkpoints.write(tmp_path / "mla", "deepseek-v2")
    for settings in ({"arbitration": "marginal"}, {"control": True}):
        error = refusal(borrowed, UnsupportedError, config(**settings), model=model, block_size=16)
        assert "MLA" in error.what
        assert error.where == "arbitration"
        assert "fixed" in error.fix


# --- configuration -------------------------------------------------------------------------------


SETTINGS = engine_options(config())


@pytest.mark.parametrize(
    "given", [*itertools.combinations(SETTINGS, 1), *itertools.combinations(SETTINGS, 2)]
)
def test_some_settings_without_the_others(eager: ChildEngine, given: tuple[str, ...]) -> None:
    options = {name: SETTINGS[name] for name in given}
    error = refusal(eager, ConfigError, None, kv_cache_memory_bytes=KV_BYTES, **options)
    for name in SETTINGS:
        flag = f"--{name.replace('_', '-')}"
        assert (flag in error.where) == (name in given)
        assert (flag in error.fix) == (name not in given)


@pytest.mark.parametrize(
    ("fluxmoe", "what"),
    [
        (config(evction="lru"), "unknown key 'evction'"),
        (config(memory={"experts": {"goal": 1}}), "unknown key 'memory.experts.goal'"),
        ({"eviction": "lru"}, "'memory' is missing"),
        ({"memory": {}}, "'memory.budget' is missing"),
        (config(eviction=7), "not 7"),
        (config(copy_threads="many"), "'many'"),
        (config(memory={"budget": "24 apples"}), "'24 apples'"),
        (config(memory={"budget": 0}), "not 0"),
        (config(memory={"frame": -4096}), "size: -4096"),
        (config(memory={"kv": {"target": "-1MiB"}}), "'-1MiB'"),
        (config(stores=[{"kind": "cloud"}]), "'cloud'"),
        ("lru", "'lru'"),
    ],
)
def test_configurations_that_do_not_validate(
    eager: ChildEngine, fluxmoe: object, what: str
) -> None:
    error = refusal(eager, ConfigError, fluxmoe)
    assert what in error.what
    assert error.where == "additional_config.fluxmoe"


def test_a_frame_that_is_not_whole_pages(eager: ChildEngine) -> None:
    error = refusal(eager, ConfigError, config(memory={"frame": 5000}))
    assert "5000" in error.what
    assert error.where == "memory.frame"


# --- versions ------------------------------------------------------------------------------------


def script(source: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that imports vLLM, in a separate process."""
    return subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_versions_of_vllm() -> None:
    result = script("""
from fluxmoe.backends.vllm.compat import require_supported
from fluxmoe.errors import UnsupportedVersionError
for version in ["0.32.0", "0.32.7", "0.32.1+cpu", "0.32.0rc1"]:
    require_supported(version)
for version in ["0.31.9", "0.33.0", "1.0", "0.9.2", "dev", "0.33.0rc1"]:
    try:
        require_supported(version)
    except UnsupportedVersionError as error:
        assert error.code == "FM403"
        assert error.what == f"vLLM {version} is not supported"
        assert ">=0.32,<0.33" in error.fix
    else:
        raise SystemExit(version)
print("done")
""")
    assert result.stdout.endswith("done\n"), result.stderr


def test_an_unsupported_version_stops_paging_but_not_vllm() -> None:
    """Users who have FluxMoE installed but do not use it must be able to upgrade vLLM."""
    result = script("""
import vllm
vllm.__version__ = "0.99.0"
from fluxmoe.backends.vllm import register
register()
register()
from vllm.model_executor.custom_op import op_registry_oot
assert not op_registry_oot
from fluxmoe.errors import UnsupportedVersionError
try:
    import fluxmoe.backends.vllm.worker.cpu
except UnsupportedVersionError as error:
    print("refused:", error)
""")
    assert result.returncode == 0, result.stderr
    assert "refused: FM403: vLLM 0.99.0 is not supported; install" in result.stdout
    assert "FluxMoE is off: FM403: vLLM 0.99.0 is not supported" in result.stdout + result.stderr


# --- the engine ----------------------------------------------------------------------------------


def test_errors_of_vllm_come_through(eager: ChildEngine) -> None:
    error = refusal(eager, EngineError, config(), max_model_len=8192)
    assert "max_model_len (8192) is greater than" in error.what
    assert "the end of its log:" in error.where
    assert "max_model_len (8192)" in error.where  # the traceback
    with pytest.raises(EngineError, match="there is no engine"):
        eager.generate([Prompt([5], 1)])
    eager.restart(fluxmoe=config(), **EAGER)
    assert answers(eager)


def test_a_policy_fault_under_strict_policies(eager: ChildEngine, tmp_path: Path) -> None:
    """The fault ends the call, but not the engine's process, and leaves nothing behind."""
    plugin = tmp_path / "tired.py"
    plugin.write_text(
        "import fluxmoe\n"
        "class Tired(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages):\n"
        "        if view.step == 3:\n"
        "            raise RuntimeError('no idea')\n"
        "        return view.last_use[pages]\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register):\n"
        "    register('tired', Tired)\n"
    )
    fluxmoe = config(
        eviction="tired",
        plugins=[str(plugin)],
        strict_policies=True,
        memory={"experts": {"target": EXPERTS * PAGE}},
    )
    eager.restart(fluxmoe=fluxmoe, **EAGER)
    long = [Prompt([5 + i, 6, 7], 8) for i in range(8)]
    with pytest.raises(FluxMoEError) as caught:
        eager.generate(long)
    assert caught.value.code == "FM203"
    assert "tired" in str(caught.value)
    short = [Prompt([5, 6, 7], 2), Prompt([9, 9], 2)]
    after = eager.generate(short)
    assert after.steps <= 3
    eager.restart(fluxmoe={**fluxmoe, "eviction": "lru"}, **EAGER)
    assert eager.generate(short).tokens == after.tokens
