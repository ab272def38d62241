"""Keys of page files: equal for equal weights, different for different weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fluxmoe.errors import CheckpointError
from fluxmoe.stores.disk import key

SHAPE = (64, 300)


def write(folder: Path, changed: str = "") -> list[Path]:
    """Write two files with tensors of 75 KiB; the values of one tensor may be changed."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(2):
        tensors = {}
        for index in range(40):
            name = f"layers.{number}.experts.{index}"
            tensors[name] = rng.standard_normal(SHAPE).astype(np.float32)
            tensors[name] += 1e-3 * (name == changed)
        save_file(tensors, path := folder / f"model-{number}.safetensors")
        paths.append(path)
    return paths


def test_copies_have_the_same_key_whatever_their_times_and_places(tmp_path: Path) -> None:
    before = key.of_files(write(tmp_path), packing="a")
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    assert key.of_files(tmp_path.iterdir(), packing="a") == before
    (moved := tmp_path / "moved").mkdir()
    assert key.of_files(write(moved), packing="a") == before
    assert key.of_files(write(moved), packing="b") != before


@pytest.mark.parametrize("index", [0, 17, 39])
def test_a_tensor_with_other_values_is_noticed(tmp_path: Path, index: int) -> None:
    before = key.of_files(write(tmp_path))
    times = [(path, path.stat()) for path in tmp_path.iterdir()]
    write(tmp_path, changed=f"layers.1.experts.{index}")
    for path, status in times:
        assert path.stat().st_size == status.st_size
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert key.of_files(tmp_path.iterdir()) != before


@pytest.mark.parametrize("expert", [0, 17, 39])
def test_one_expert_of_a_fused_tensor_with_other_values_is_noticed(tmp_path, expert) -> None:
    path = tmp_path / "model.safetensors"
    weights = np.random.default_rng(0).standard_normal((40, *SHAPE)).astype(np.float32)
    save_file({"layers.0.experts.gate_up_proj": weights}, path)
    before = key.of_files([path])
    weights[expert] += 1e-3
    save_file({"layers.0.experts.gate_up_proj": weights}, path)
    assert key.of_files([path]) != before


def test_a_renamed_tensor_and_a_longer_file_are_noticed(tmp_path: Path) -> None:
    paths = write(tmp_path)
    before = key.of_files(paths)
    data = paths[0].read_bytes()
    paths[0].write_bytes(data.replace(b"experts.17", b"experts.99", 1))
    assert key.of_files(paths) != before
    paths[0].write_bytes(data + b"\0")
    assert key.of_files(paths) != before
    paths[0].write_bytes(data)
    assert key.of_files(paths) == before


def test_a_file_of_the_hub_is_known_by_its_name_and_its_samples(tmp_path: Path) -> None:
    blob, link = tmp_path / ("0123456789abcdef" * 4), tmp_path / "model.safetensors"
    blob.write_bytes(b"1")
    link.symlink_to(blob)
    before = key.of_files([link])
    link.write_bytes(b"2")  # an edit through the link, which keeps the name
    assert key.of_files([link]) != before
    link.write_bytes(b"1")
    assert key.of_files([link]) == before
    link.unlink()
    blob.rename(other := tmp_path / ("f123456789abcdef" * 4))
    link.symlink_to(other)
    assert key.of_files([link]) != before


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 9, b"\2" + bytes(7) + b"{}" * 3000])
def test_other_formats_are_sampled(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    before = key.of_files([path])
    path.write_bytes(data[:-1] + b"z")
    assert key.of_files([path]) != before


def test_what_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weight files.*keep the experts in host"):
        key.of_files([])
    with pytest.raises(CheckpointError, match="cannot read the file: No such file"):
        key.of_files([tmp_path / "none"])


def test_weights_in_memory_are_known_by_all_their_bytes() -> None:
    layers = [[np.zeros((4, 1000), np.uint8) for _ in range(2)] for _ in range(3)]
    before = key.of_contents(layers)
    assert key.of_contents(layers) == before
    layers[2][1][3, 999] = 1
    assert key.of_contents(layers) != before
