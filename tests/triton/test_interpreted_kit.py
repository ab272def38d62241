"""The experiments of benchmarks/gpu run to completion on Triton's interpreter."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from benchmarks.gpu import check, command, copies, decode, device, events, kernel
from fluxmoe.cuda.kernels.pages import pack_pages
from fluxmoe.errors import CodecError
from fluxmoe.stores.codec.fixed4 import Fixed4

# Random bits overflow, on purpose; torch warns about its own code when vLLM is imported.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow:RuntimeWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)


class Clock:
    """A replacement for the GPU timer that runs the work once."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def __call__(self, work) -> float:
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e6


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(device, "require", lambda: torch.device("cpu"))
    monkeypatch.setattr(device, "describe", lambda: {"gpu": "the interpreter"})
    monkeypatch.setattr(device, "pinned", lambda tensor: tensor)
    monkeypatch.setattr(device, "Timer", Clock)


def results(capsys, *argv: str):
    capsys.readouterr()
    command.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_check(card, monkeypatch, capsys):
    for name, value in dict(N=64, K=128, TOKENS=5).items():
        monkeypatch.setattr(check, name, value)
    rows = results(capsys, "check")
    assert len(rows) == 5 * 6 + 2 and all(row["passed"] for row in rows)


def test_check_notices_a_wrong_kernel(card, monkeypatch, capsys):
    for name, value in dict(N=64, K=64, TOKENS=3).items():
        monkeypatch.setattr(check, name, value)
    monkeypatch.setattr(check, "gather_pages", lambda *work: None)
    monkeypatch.setattr(check, "weights_rows", lambda device: [])
    with pytest.raises(SystemExit, match="WRONG"):
        command.main(["check", "--json"])
    verdicts = {row["what"]: row["passed"] for row in json.loads(capsys.readouterr().out)}
    assert verdicts == {"gather": False, "event rule": True}


@pytest.mark.xdist_group("vllm")  # vLLM takes a long time to import
def test_results_have_the_bits_of_stocks_kernel(card, stock, capsys, tmp_path):
    path = tmp_path / "deep" / "kernel.json"
    rows = results(capsys, "kernel", "--shape", "tiny", "--tokens", "1,70", "--save", str(path))
    assert [row["tokens"] for row in rows] == [1, 70]
    assert all(row["identical"] and row["in_place"] and row["vllm"] for row in rows)
    assert json.loads(path.read_text()) == {"machine": {"gpu": "the interpreter"}, "results": rows}


@pytest.mark.xdist_group("vllm")
def test_a_difference_from_stock_is_noticed(card, stock, monkeypatch, capsys):
    wrong = kernel.vllm_stock

    def off_by_one_bit(*batch):
        run = wrong(*batch)
        return lambda: (run().view(torch.int16) ^ 1).view(torch.bfloat16)

    monkeypatch.setattr(kernel, "vllm_stock", off_by_one_bit)
    with pytest.raises(SystemExit, match="NOT identical"):
        kernel.main(["--shape", "tiny", "--tokens", "1"])
    assert "NO" in capsys.readouterr().out


def test_kernel_prints_a_table(card, capsys):
    kernel.main(["--shape", "tiny", "--tokens", "1"])
    out = capsys.readouterr().out
    assert "in_place/raw" in out and "tiny" in out


def test_decode(card, capsys):
    rows = results(capsys, "decode", "--shape", "tiny")
    assert {(row["part"], row["pages"]) for row in rows} == {
        (part, count) for part in ("w13", "w2") for count in (1, 4)
    }
    assert all(row["identical"] and row["raw/coded"] > 1.2 for row in rows)
    assert decode.__doc__


def test_copies(card, monkeypatch, capsys):
    monkeypatch.setattr(copies, "WHOLE", 1 << 20)
    monkeypatch.setattr(copies, "SIZES", {"4 KiB": 1 << 12})
    rows = results(capsys, "copies")
    assert [row["pages"] for row in rows] == [1, 8, 64]
    assert all(row["identical"] for row in rows)


def test_events(card, monkeypatch, capsys):
    for name, value in dict(LAYERS=3, EXPERTS=16, TOP_K=4).items():
        monkeypatch.setattr(events, name, value)
    rows = results(capsys, "events")
    full, half = rows[:4], rows[4:]
    assert all(row["misses"] == row["evictions"] == 0 and row["hits"] >= 4 for row in full)
    assert all(row["misses"] > 0 and row["misses"] == row["evictions"] for row in half)


def test_mapping(monkeypatch):
    """Use the fake driver of the substrate's tests."""
    driver = pytest.importorskip("fluxmoe.cuda.driver")
    from benchmarks.gpu import mapping
    from fluxmoe.cuda.fake import FakeDriver

    row = mapping.measure(driver.CudaDriver(FakeDriver()), 8, repeats=2, frame_bytes=4096)
    assert row["frames"] == 8 and min(row["first"], row["again"], row["decommit"]) > 0


def test_damaged_and_foreign_blocks_do_not_reach_a_device():
    weights = (np.random.default_rng(0).standard_normal((64, 128)) * 0.02).astype(np.float32)
    raw = (weights.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    block = Fixed4(128).encode(raw)
    assert pack_pages([block, block], 64, 128, "cpu").offsets.tolist() == [0, -(-len(block) // 128)]
    with pytest.raises(CodecError, match="not 128 × 64"):
        pack_pages([block], 128, 64, "cpu")
    for byte in (0, len(block) // 2, len(block) - 70):
        damaged = block.copy()
        damaged[byte] ^= 4
        with pytest.raises(CodecError, match="checksum"):
            pack_pages([damaged], 64, 128, "cpu")
