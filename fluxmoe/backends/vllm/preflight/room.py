"""Lower bounds on the memory that a server needs, computed from the model's files alone.

An engine cannot serve with a budget below these bounds. After vLLM has built the model, the worker
computes the exact sizes, which are larger because of rounding to blocks, the scheduler's reserve
and replicated heads.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxmoe.backends.budget import KVNeed, require_for_weights
from fluxmoe.backends.partition import partition
from fluxmoe.config import Resolved
from fluxmoe.dimensions import Model
from fluxmoe.errors import ConfigError

#: Bytes of a weight for vLLM's ``dtype``; ``auto`` converts 4-byte weights to 2 bytes.
_DTYPES = {"float32": 4, "float": 4, "float16": 2, "bfloat16": 2, "half": 2}
#: Suffixes of vLLM's human-readable numbers.
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def require(config: Resolved, model: Model, options: Mapping[str, Any], workers: int) -> None:
    """Reject a budget that cannot hold one token's experts and one request, or exceeds free memory.

    Args:
        config: The configuration, with the budget of one worker.
        model: Sizes of the model.
        options: vLLM's options.
        workers: Number of tensor-parallel workers.

    Raises:
        ConfigError, BudgetTooSmallError: See ``partition``, ``budget.require_for_weights``.
    """
    weight = _weight_bytes(model, options)
    geometry, page = model.paged(weight, workers)
    if not page.nbytes:
        raise ConfigError(
            f"{workers} workers cannot share experts of {model.page_bytes} bytes",
            where="vllm.tensor-parallel-size",
            fix="use fewer workers",
        )
    tokens = _tokens(config, model, options)
    element = 1 if "8" in str(options.get("kv-cache-dtype", "auto")) else weight
    request = model.request_bytes(tokens) * element // model.weight_bytes // workers
    memory = config.memory
    if memory.frame is None:  # the smallest frame, so that rounding rejects nothing that fits
        memory = memory.model_copy(update={"frame": mmap.PAGESIZE})
    partition(
        memory,
        geometry,
        page,
        KVNeed(request, max(request, int(memory.budget)), f"one request of {tokens} tokens"),
        top_k=model.top_k,  # only the worker finds out if the kernel cannot run in waves
    )
    require_for_weights(
        config,
        experts=model.experts_bytes * weight // model.weight_bytes,
        others=model.other_bytes * weight // model.weight_bytes,
        workers=workers,
    )


def _weight_bytes(model: Model, options: Mapping[str, Any]) -> int:
    return _DTYPES.get(str(options.get("dtype", "auto")), min(model.weight_bytes, 2))


def _tokens(config: Resolved, model: Model, options: Mapping[str, Any]) -> int:
    """Return a lower bound on the tokens of the longest request; 1 if unknown."""
    given = options.get("max-model-len")
    if given is None:
        return min(model.longest, _tokenizer_longest(Path(config.model or ""))) or 1
    text = str(given)
    factor = _SUFFIXES.get(text[-1:], 1)
    try:
        return max(int(float(text.rstrip("kmgKMG")) * factor), 1)
    except (ValueError, OverflowError):  # the value is auto, or vLLM's parser will reject it
        return 1


def _tokenizer_longest(folder: Path) -> int:
    try:
        found = json.loads((folder / "tokenizer_config.json").read_bytes())["model_max_length"]
        return int(found)
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return 2**63
