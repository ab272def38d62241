"""Checks of a checkpoint's files that take milliseconds, before an engine spends minutes.

Only headers, sizes and names are checked: a file whose weights were modified in place loads without
an error, as it does elsewhere.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import defaultdict
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
from fluxmoe.inventory import ExpertTensor, Shapes, expert_tensor, require_experts
from fluxmoe.words import line

_INDEX = "model.safetensors.index.json"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
#: Keys under which a multi-part model describes the part with experts, outermost first.
_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")
#: Load formats of vLLM that read safetensors files if present.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Tensor(NamedTuple):
    """Shape and item size of a weight, without its data."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def require_readable(model: str) -> None:
    """Reject a model that cannot be loaded. Hub names are left to the code that loads them.

    Args:
        model: A folder, or the name of a model on a hub (``organisation/name``).

    Raises:
        CheckpointError: A file is missing, damaged or incomplete.
    """
    folder = Path(model)
    if folder.is_dir():
        config = _config(folder)
        require_experts(_weights(folder), text_part(config), where=model)
    elif folder.exists():
        raise CheckpointError("it is a file", where=model, fix="name the folder of a checkpoint")
    elif not is_hub_name(model):
        raise CheckpointError("no such folder", where=model, fix="name the folder of a checkpoint")


def is_hub_name(model: str) -> bool:
    """True if ``model`` can be the name of a model on a hub: ``name`` or ``organisation/name``."""
    return _HUB_NAME.fullmatch(model) is not None


def downloaded(model: str, revision: str | None = None, cache: str | None = None) -> str:
    """Return the cached folder of a hub model if it exists, else the name unchanged."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).exists() or not is_hub_name(model):
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
    """Sum the sizes of a checkpoint's weight files, in bytes.

    Raises:
        ConfigError: ``model`` is not a folder with such files.
    """
    files = [*Path(model).glob("*.safetensors")] if Path(model).is_dir() else []
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


def _weights(folder: Path) -> Shapes:
    index = folder / _INDEX
    listed: dict[str, set[str]] = defaultdict(set)
    if index.exists():
        weight_map = read_map(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError("no weight_map", where=str(index))
        for tensor, file in weight_map.items():
            listed[str(file)].add(tensor)
    else:
        for path in folder.glob("*.safetensors"):
            listed[path.name] = set()
    found: Shapes = {}
    for name, tensors in sorted(listed.items()):
        there = {key: shape for key, shape, _ in _headers(folder / name)}
        if missing := tensors - there.keys():
            raise CheckpointError(
                f"{min(missing)} is missing, but listed in {_INDEX}",
                where=str(folder / name),
                fix="download or copy it again",
            )
        found |= there
    return found


def _headers(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """List name, shape and dtype of each tensor in a file; its header must cover all bytes."""
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
    """Read a JSON file with an object, such as ``config.json``. Raises CheckpointError."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=str(path))
    return data


def headers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name, shape and size of every weight in a checkpoint, from its file headers.

    Raises:
        QuantisedError: The experts have a dtype that cannot be paged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        for key, shape, dtype in _headers(path):
            if dtype not in _BYTES and ".experts." in key:
                raise quantised(f"{key} is {dtype}", str(path))
            yield key, Tensor(shape, _BYTES.get(dtype, 1))


def expert_tensors(folder: Path) -> Iterator[tuple[ExpertTensor, str, list[int], Bytes]]:
    """Yield name, dtype, shape and bytes of every unquantised expert tensor in a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            for key, entry in json.loads(file.read(length)).items():
                name = expert_tensor(key, len(entry.get("shape", ())))
                if name is not None and name.end in ("", ".weight"):
                    begin, end = entry["data_offsets"]
                    file.seek(8 + length + begin)
                    data = np.frombuffer(bytearray(file.read(end - begin)), np.uint8)
                    yield name, entry["dtype"], entry["shape"], data


def refuse_quantised(model: str, config: Mapping[str, Any]) -> None:
    """Refuse a quantised checkpoint by its ``config.json``, and by its weights if it is a folder.

    Raises:
        QuantisedError: The checkpoint is quantised.
    """
    settings = text_part(config).get("quantization_config")
    tensor = _quantised_tensor(Path(model)) if Path(model).is_dir() else ""
    if settings or tensor:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        by = f" with {method}" if method else ""
        raise quantised(f"the checkpoint is quantised{by}{tensor and f' ({tensor})'}", model)


def _quantised_tensor(folder: Path) -> str:
    """Describe the first quantised expert tensor; empty if there is none."""
    for path in sorted(folder.glob("*.safetensors")):
        for key, shape, dtype in _headers(path):
            # At least three dimensions; otherwise fused expert tensors would not be recognised.
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
    """The error for experts whose names or shapes are not known, described by ``detail``."""
    return UnsupportedError(
        f"the expert layout of the architecture {architecture!r} is not supported yet: {detail}",
        where=where,
        fix="use it without FluxMoE",
    )


def not_buildable(architecture: str, error: Exception, where: str) -> FluxMoEError:
    """The error for a model whose configuration is read, but not built, by ``transformers``."""
    kind = MissingDependencyError if isinstance(error, ImportError) else UnsupportedError
    return kind(
        "transformers cannot build a causal language model of the architecture "
        f"{architecture!r}: {first_line(error)}",
        where=where,
    )


def not_loadable(model: str, error: Exception) -> FluxMoEError:
    """The error for a model that ``transformers`` cannot find, read or recognise."""
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return UnsupportedError(
            f"unknown architecture: {first_line(error)}",
            where=model,
            fix="upgrade transformers, or allow the model's own code",
        )
    return CheckpointError(
        f"cannot load the model: {first_line(error)}",
        where=model,
        fix="name the folder of a Hugging Face checkpoint, or a model on the Hub",
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return line(str(error).strip().partition("\n")[0])
