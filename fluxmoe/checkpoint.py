"""Quick checks of a checkpoint's files, made before an engine spends minutes on loading them.

Only headers, sizes and names are checked: a file whose weights were modified in place loads without
an error, as in other programs.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from fluxmoe.core.types import Bytes
from fluxmoe.errors import (
    CheckpointError,
    ConfigError,
    FluxMoEError,
    MissingDependencyError,
    QuantisedError,
    UnsupportedError,
)
from fluxmoe.inventory import ExpertTensor, expert_tensor, require_experts
from fluxmoe.words import line

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
#: Keys under which a multi-part model describes the part with experts, outermost first.
_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")
#: Load formats of vLLM that read safetensors files if these are present.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Tensor(NamedTuple):
    """Shape and item size of a weight, without its data."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def require_readable(model: str) -> None:
    """Reject a model that cannot be loaded; hub names are checked only by the code that loads them.

    Args:
        model: A folder, or the name of a model on a hub (``organisation/name``).

    Raises:
        CheckpointError: A file is missing, damaged or incomplete.
    """
    folder = Path(model)
    if os.path.isdir(folder):
        config = _config(folder)
        shapes = {key: shape for _, key, shape, _ in _tensors(folder)}
        require_experts(shapes, text_part(config), where=model)
    elif os.path.exists(folder):
        raise CheckpointError(
            "the path is a file", where=model, fix="name the folder of a checkpoint"
        )
    elif not is_hub_name(model):
        raise CheckpointError(
            "no such folder",
            where=model,
            fix="name the folder of a checkpoint, or a model on the Hub: organisation/name",
        )


def is_hub_name(model: str) -> bool:
    """Return True if ``model`` can be a name on a hub: ``organisation/name``."""
    return _HUB_NAME.fullmatch(model) is not None


def downloaded(model: str, revision: str | None = None, cache: str | None = None) -> str:
    """Return the cached folder of a hub model if there is one, otherwise the name unchanged."""
    if os.path.exists(model) or not is_hub_name(model):
        return model
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:  # the package comes with the engines; without them nothing is downloaded
        return model
    found = try_to_load_from_cache(model, "config.json", cache_dir=cache, revision=revision)
    return str(Path(found).parent) if isinstance(found, str) else model


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a ``config.json``, which may describe several models."""
    for key in _PARTS:
        if isinstance(part := config.get(key), Mapping):
            config = {**config, **part}
    return config


def weight_bytes(model: str) -> int:
    """Return the total size of a checkpoint's weight files in bytes.

    Raises:
        ConfigError: ``model`` is not a folder with weight files.
        CheckpointError: See ``weight_files``.
    """
    files = weight_files(Path(model)) if os.path.isdir(model) else []
    if not files:
        raise ConfigError(
            f"auto needs the size of the weights; {model} is not a folder with safetensors files",
            where="memory.budget",
            fix="set a size such as 24GiB, or use a folder as the model",
        )
    return sum(path.stat().st_size for path in files)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            "the folder has no config.json",
            where=str(folder),
            fix="name the folder of a checkpoint",
        )
    config = read_map(path)
    if "model_type" not in config:
        raise CheckpointError("no model_type", where=str(path))
    return config


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files with a checkpoint's weights, in order; empty if there are none.

    These are the files that the index names; without an index, ``model.safetensors``; without that
    file, the only file. A folder may have further files: other formats of the same weights, or
    left-over shards.

    Raises:
        CheckpointError: The index is damaged, or there are several files and no index.
    """
    listed = _listed(folder)
    if listed is not None:
        return [folder / name for name in sorted(set(listed.values()))]
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise CheckpointError(
            f"there are {len(found)} files of weights, but no {_INDEX} that lists them",
            where=str(folder),
            fix="download or copy the index as well",
        )
    return found


def _listed(folder: Path) -> dict[str, str] | None:
    """Read the index (tensor → file); return None if there is no index."""
    index = folder / _INDEX
    if not index.exists():
        return None
    listed = read_map(index).get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError("no weight_map", where=str(index))
    return {str(tensor): str(file) for tensor, file in listed.items()}


def _tensors(folder: Path) -> Iterator[tuple[Path, str, tuple[int, ...], str]]:
    """Yield the file, name, shape and dtype of each tensor once.

    Raises:
        CheckpointError: A file is missing or damaged, or lacks a tensor that the index lists.
    """
    listed = _listed(folder)
    for path in weight_files(folder):
        there = {key: (shape, dtype) for key, shape, dtype in _headers(path)}
        if listed is not None:
            promised = {tensor for tensor, file in listed.items() if file == path.name}
            if missing := promised - there.keys():
                raise CheckpointError(
                    f"{min(missing)} is missing, but listed in {_INDEX}",
                    where=str(path),
                    fix="download or copy it again",
                )
            there = {key: there[key] for key in there if key in promised}
        for key, (shape, dtype) in there.items():
            yield path, key, shape, dtype


def _headers(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """List the name, shape and dtype of each tensor in a file, whose header must be complete."""
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the file is missing, but listed in {_INDEX}",
            where=str(path),
            fix="download or copy it",
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"damaged or truncated: {error}", where=str(path), fix="download or copy it again"
        ) from error


def read_map(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file such as ``config.json``; raise CheckpointError on failure."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=str(path))
    return data


def headers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name, shape and item size of every weight in a checkpoint, from the headers.

    Elements of a dtype that experts cannot have count as one byte each.
    """
    for _, key, shape, dtype in _tensors(folder):
        yield key, Tensor(shape, _BYTES.get(dtype, 1))


def expert_tensors(folder: Path) -> Iterator[tuple[ExpertTensor, str, list[int], Bytes]]:
    """Yield the name, dtype, shape and bytes of every unquantised expert tensor in a checkpoint."""
    listed = _listed(folder)
    for path in weight_files(folder):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            for key, entry in json.loads(file.read(length)).items():
                if listed is not None and listed.get(key) != path.name:
                    continue
                name = expert_tensor(key, len(entry.get("shape", ())))
                if name is not None and name.end in ("", ".weight"):
                    begin, end = entry["data_offsets"]
                    file.seek(8 + length + begin)
                    data = np.frombuffer(bytearray(file.read(end - begin)), np.uint8)
                    yield name, entry["dtype"], entry["shape"], data


def refuse_quantised(model: str, config: Mapping[str, Any]) -> None:
    """Reject a quantised checkpoint.

    The check reads ``config`` and, if ``model`` is a folder, the headers of the weight files.

    Raises:
        QuantisedError: The checkpoint is quantised.
    """
    settings = text_part(config).get("quantization_config")
    tensor = _quantised_tensor(Path(model)) if os.path.isdir(model) else ""
    if settings or tensor:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        by = f" with {method}" if method else ""
        raise quantised(f"the checkpoint is quantised{by}{tensor and f' ({tensor})'}", model)


def _quantised_tensor(folder: Path) -> str:
    """Describe the first quantised expert tensor; empty if there is none."""
    for _, key, shape, dtype in _tensors(folder):
        # Assume at least three dimensions; otherwise fused expert tensors might not be recognised.
        if dtype not in _BYTES and expert_tensor(key, max(len(shape), 3)):
            return f"{key} is {dtype}"
    return ""


def quantised(what: str, where: str) -> QuantisedError:
    """Make the error for quantised experts, described by ``what``."""
    return QuantisedError(
        f"{what}, and quantised experts cannot be paged yet",
        where=where,
        fix="use an unquantised (bf16, fp16 or fp32) checkpoint",
    )


def unknown_layout(architecture: str, detail: str, where: str) -> UnsupportedError:
    """Make the error for experts with unknown names or shapes, described by ``detail``."""
    return UnsupportedError(
        f"the expert layout of the architecture {architecture!r} is not supported yet: {detail}",
        where=where,
        fix="use it without FluxMoE",
    )


def not_buildable(architecture: str, error: Exception, where: str) -> FluxMoEError:
    """Make the error for a model that ``transformers`` can configure but not build."""
    kind = MissingDependencyError if isinstance(error, ImportError) else UnsupportedError
    return kind(
        "transformers cannot build a causal language model of the architecture "
        f"{architecture!r}: {first_line(error)}",
        where=where,
    )


def not_loadable(model: str, error: Exception) -> FluxMoEError:
    """Make the error for a model that ``transformers`` cannot find, read or recognise."""
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return UnsupportedError(
            f"unknown architecture: {first_line(error)}",
            where=model,
            fix="upgrade transformers, or allow the model's own code",
        )
    return CheckpointError(
        f"cannot load the model: {first_line(error)}",
        where=model,
        fix="use the folder of a Hugging Face checkpoint, or a model on the Hub",
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return line(str(error).strip().partition("\n")[0])
