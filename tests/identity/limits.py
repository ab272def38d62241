"""Features that vLLM does not support on a CPU: errors of stock vLLM and of FluxMoE."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.errors import EngineError, FluxMoEError
from fluxmoe.testing import checkpoints
from tests.identity import models, requests
from tests.identity.cells import MLA


@dataclass(frozen=True, slots=True)
class Trial:
    """A feature to try with vLLM on a CPU.

    Attributes:
        name: Description of the feature.
        options: vLLM's options, in addition to those of all engines of the matrix.
        model: Architecture of the model.
        checkpoint: Changes to the model's checkpoint.
        seeded: True to sample with a seed per request.
    """

    name: str
    options: dict[str, Any]
    model: str = "qwen3-moe"
    checkpoint: dict[str, Any] = field(default_factory=dict)
    seeded: bool = False


#: Maximum length of a recorded error.
LENGTH = 200

CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": requests.CHUNK}

TRIALS = (
    Trial(
        "MLA of a size other than 512 + 64",
        {},
        "deepseek-v2",
        {"kv_lora_rank": 64, "qk_rope_head_dim": 16},
    ),
    Trial("MLA with prefix caching", {"enable_prefix_caching": True}, "deepseek-v2"),
    Trial("Mamba-2 with prefix caching", {"enable_prefix_caching": True}, "granite-hybrid"),
    Trial("MLA with chunked prefill", CHUNKED, "deepseek-v2"),
    Trial("a seed per request with a split prefill", CHUNKED, seeded=True),
    Trial("experts quantised to fp8", {"quantization": "fp8"}),
    Trial("experts quantised to mxfp8", {"quantization": "mxfp8"}),
    Trial("experts quantised by bitsandbytes", {"quantization": "bitsandbytes"}),
    Trial("expert parallelism", {"enable_expert_parallel": True}),
    Trial(
        "expert load balancing",
        {"enable_expert_parallel": True, "enable_eplb": True},
    ),
    Trial("dual batch overlap", {"enable_dbo": True}),
    Trial("sleep mode", {"enable_sleep_mode": True}),
    Trial(
        "vLLM's own offloading by layers", {"offload_backend": "prefetch", "offload_group_size": 2}
    ),
    Trial("vLLM's own offloading by UVA", {"cpu_offload_gb": 1}),
    Trial("routed experts returned", {"enable_return_routed_experts": True}),
    Trial("a KV cache in fp8", {"kv_cache_dtype": "fp8"}),
)


@dataclass(frozen=True, slots=True)
class Found:
    """Errors of stock vLLM and of FluxMoE in a trial; empty on success."""

    name: str
    vllm: str
    fluxmoe: str


def attempt(trial: Trial, folder: Path) -> Found:
    """Run a trial on stock vLLM and on FluxMoE, each in a separate process."""
    path = (
        checkpoints.write(folder / f"{trial.model}-changed", trial.model, **trial.checkpoint)
        if trial.checkpoint
        else models.write(folder, trial.model)
    )
    arena = models.shape(path).arena_bytes("half", 1)
    memory = {
        "budget": arena + requests.KV_BYTES,
        "frame": models.FRAME,
        "experts": {"target": arena},
        "kv": {"target": requests.KV_BYTES},
    }
    options = {**requests.OPTIONS, "enforce_eager": True, **trial.options}
    if trial.model in MLA:
        options["block_size"] = 16
    stock = _error(trial, path, {**options, "kv_cache_memory_bytes": requests.KV_BYTES})
    return Found(trial.name, stock, _error(trial, path, {**options, "fluxmoe": {"memory": memory}}))


def _error(trial: Trial, path: Path, options: dict[str, Any]) -> str:
    """Run a few requests; return the error, or a setting that vLLM changed, or an empty string."""
    long = [Prompt([5 + i] * requests.LONG, 4, 1.0 if trial.seeded else 0.0, i) for i in range(4)]
    try:
        with ChildEngine(path, **options) as engine:
            for setting in ("prefix_caching", "chunked_prefill"):
                if trial.options.get(f"enable_{setting}") and not engine.info[setting]:
                    return f"forces {setting} off"
            engine.generate(long)
    except EngineError as error:
        return _plain(error.what.removeprefix("the engine failed: "))
    except FluxMoEError as error:
        return f"{error.code}: {error.what}"
    return ""


def _plain(error: str) -> str:
    """Shorten a message to one line, without pydantic's frame."""
    text = re.sub(r"^\w+: \d+ validation errors? for \w+\s+Value error, ", "ValueError: ", error)
    text = " ".join(re.sub(r" \[type=.*", "", text, flags=re.DOTALL).split())
    return text if len(text) <= LENGTH else text[:LENGTH] + "…"
