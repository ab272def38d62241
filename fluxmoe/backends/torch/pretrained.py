"""Loading by ``transformers``: its errors in FluxMoE's terms, and nothing random accepted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from fluxmoe import checkpoint
from fluxmoe.arguments import wrong
from fluxmoe.errors import CheckpointError, ConfigError

#: Supported dtypes of experts' weights.
_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def unpaged(name: str) -> Any:
    """The model that ``transformers`` loads, with weights in their stored type, to be paged later.

    Raises:
        CheckpointError, UnsupportedError: It cannot be loaded, is quantised, or not known.
    """
    folder = checkpoint.downloaded(name)
    checkpoint.require_readable(folder)
    if os.path.isdir(folder):
        config = checkpoint.read_map(Path(folder) / "config.json")
        checkpoint.refuse_quantised(folder, config)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    except Exception as error:  # of any model's own code
        raise checkpoint.not_loadable(name, error) from error


def on_meta(
    name: str, folder: str, dtype: str | torch.dtype, extra: dict[str, Any]
) -> torch.nn.Module:
    """Build the model on the meta device, before its weights are read."""
    try:
        config = transformers.AutoConfig.from_pretrained(name, **extra)
    except Exception as error:  # of any model's own code
        raise checkpoint.not_loadable(name, error) from error
    checkpoint.refuse_quantised(folder, config.to_dict())
    found = config.dtype if dtype == "auto" else dtype
    if found is None:
        raise ConfigError(
            "the checkpoint does not state the type of its weights",
            where=name,
            fix='give their type, such as dtype="bfloat16"',
        )
    how = {
        key: extra[key] for key in ("experts_implementation", "trust_remote_code") if key in extra
    }
    try:
        with torch.device("meta"):
            model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=found, **how
            )
    except Exception as error:  # of any model's own code
        raise checkpoint.not_buildable(config.model_type, error, name) from error
    return model


def type_of_weights(dtype: object) -> str | torch.dtype:
    """Convert ``dtype`` to the form accepted by transformers. Raises ConfigError."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto" or found in _TYPES:
        return "auto" if dtype == "auto" else found
    raise wrong(
        "dtype",
        f'"auto" or one of {", ".join(str(each).removeprefix("torch.") for each in _TYPES)}',
        dtype,
        "fluxmoe.load",
    )


def require_all(report: Mapping[str, Any], name: str) -> None:
    """Reject a model with random weights in place of missing or mismatched ones."""
    if wrong := sorted(report["mismatched_keys"]):
        key, found, wanted = wrong[0]
        raise CheckpointError(
            f"{key} is {list(found)} in the checkpoint, and {list(wanted)} by its config.json"
            + _and_more(wrong),
            where=name,
            fix="get config.json and weights from the same source",
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"the checkpoint has no weights for {missing[0]}" + _and_more(missing),
            where=name,
            fix="get the complete checkpoint; random weights would replace them",
        )


def _and_more(items: Sequence[object]) -> str:
    return f", and {len(items) - 1} more" if items[1:] else ""


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Convert loading errors to CheckpointError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load the model: {checkpoint.first_line(error)}",
            where=name,
            fix="use a folder with a Hugging Face checkpoint in safetensors format",
        ) from error


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Disable the threads that read ahead and keep the tensors they have read and converted.

    Also affects other threads that load a model at the same time.
    """
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
