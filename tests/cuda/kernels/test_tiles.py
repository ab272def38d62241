"""Tile sizes compared with stock vLLM's code, and valid and invalid tables of tile sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxmoe.cuda.kernels.tiles import Tiles, default_tiles, read_table, tiles_for
from fluxmoe.errors import ConfigError

ROW = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 256,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 2,
}


def stock(row: dict[str, int]) -> Tiles:
    return Tiles(
        row["BLOCK_SIZE_M"],
        row["BLOCK_SIZE_N"],
        row["BLOCK_SIZE_K"],
        row["GROUP_SIZE_M"],
        row["num_warps"],
        row["num_stages"],
    )


@pytest.mark.vllm
def test_defaults_are_stocks() -> None:
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    for experts, n, k, top_k in ((128, 768, 2048, 8), (8, 14336, 4096, 2), (1, 64, 64, 1)):
        for tokens in (1, 2, 8, 16, 32, 33, 64, 65, 96, 97, 128, 129, 512, 513, 2048, 40000):
            want = fused_moe.get_default_config(tokens, experts, n, k, top_k, None)
            assert default_tiles(tokens, experts) == stock(want), tokens


@pytest.mark.vllm
def test_stocks_tuned_tables_can_be_read() -> None:
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    tables = sorted((Path(fused_moe.__file__).parent / "configs").glob("E=*NVIDIA_H*.json"))
    assert tables
    for path in tables:
        table = read_table(path)
        for tokens, row in json.loads(path.read_text()).items():
            if tokens != "triton_version":
                assert table[int(tokens)] == stock(row)


def test_the_nearest_entry_is_taken() -> None:
    small, large = Tiles(16, 64, 64), Tiles(64, 128, 64)
    table = {1: small, 64: large}
    assert tiles_for(30, 8, table) == small
    assert tiles_for(40, 8, table) == large
    assert tiles_for(9000, 8, table) == large
    assert tiles_for(30, 8) == tiles_for(30, 8, {}) == default_tiles(30, 8)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"1": {}}', '{"one": 1}', json.dumps({"1": ROW | {"num_warps": None}})],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a table of tile sizes") as error:
        read_table(path)
    assert "table.json" in str(error.value)


def test_a_table_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a table"):
        read_table(tmp_path / "none.json")


def test_a_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"triton_version": "3.6.0", "8": ROW}))
    assert read_table(path) == {8: Tiles(16, 64, 256, 1, 4, 2)}
