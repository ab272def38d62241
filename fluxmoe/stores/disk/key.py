"""Keys of page files: short descriptions of the weights that the pages contain."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fluxmoe.core.types import Bytes
from fluxmoe.errors import CheckpointError
from fluxmoe.stores.disk.reader import checksum

#: Describes the weights; a function, because a model may be downloaded after the store is made.
Key = Callable[[], Mapping[str, object]]

_BLOCK = 4096
#: Minimum number of blocks of a file to sample.
_BLOCKS = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")


def of_files(files: Iterable[Path], **more: object) -> dict[str, object]:
    """Describe weights by the files that contain them.

    A file is described by its size, its header and samples of 4096 bytes: 64 distributed over the
    file, and one from each tensor, or from each expert if a tensor has more than two dimensions. A
    file in the Hub's cache is also described by its name, which is its SHA-256 unless the file was
    edited through the link. File times are not used, because copying tools can preserve them.

    Args:
        files: Weight files, in any order.
        more: Further properties on which the pages depend, such as the packing.

    Returns:
        The key.

    Raises:
        CheckpointError: There are no files, or a file cannot be read.
    """
    total = hashlib.sha256()
    paths = sorted(files)
    if not paths:
        raise CheckpointError(
            "the checkpoint has no weight files by which its page file could be found",
            fix="keep the experts in host memory",
        )
    for path in paths:
        blob = path.resolve().name
        if path.is_symlink() and _SHA256.fullmatch(blob):
            total.update(blob.encode())
        total.update(_sampled(path))
    return {"weights": total.hexdigest(), **more}


def of_contents(layers: Iterable[Sequence[Bytes]], **more: object) -> dict[str, object]:
    """Describe weights in memory by a checksum of all their bytes.

    Args:
        layers: For each layer, one uint8 array ``[experts, nbytes]`` per part.
        more: Further properties on which the pages depend.

    Returns:
        The key.
    """
    total = hashlib.sha256()
    for parts in layers:
        for rows in parts:
            for row in rows:
                total.update(checksum(np.ascontiguousarray(row)).to_bytes(8, "little"))
    return {"contents": total.hexdigest(), **more}


def _sampled(path: Path) -> bytes:
    """Compute a digest of a file's size, header and samples."""
    found = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            # Without this advice, the kernel would read ahead at each sample.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            found.update(size.to_bytes(8, "little"))
            for offset, nbytes in _samples(file.fileno(), size):
                found.update(os.pread(file.fileno(), nbytes, offset))
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    return found.digest()


def _samples(fd: int, size: int) -> list[tuple[int, int]]:
    """Choose the offsets and lengths of the samples of a file."""
    last = max(size - _BLOCK, 0)
    places = [(last * i // (_BLOCKS - 1), _BLOCK) for i in range(_BLOCKS)]
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0).ljust(8, b"\0"))
    try:
        tensors = json.loads(os.pread(fd, length, 8)) if length < size else {}
        described = [tensors[name] for name in tensors if name != "__metadata__"]
        first = 8 + length if described else 0
        places.append((0, first))
        for tensor in described:
            begin, end = tensor["data_offsets"]
            shape = tensor["shape"]
            count = shape[0] if len(shape) > 2 else 1  # such as all experts of a layer
            for index in range(count):
                middle = begin + (end - begin) * (2 * index + 1) // (2 * count)
                places.append((first + middle // _BLOCK * _BLOCK, _BLOCK))
    except (ValueError, TypeError, LookupError):
        pass  # not a safetensors file
    return places
