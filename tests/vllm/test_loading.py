"""vLLM loads experts one by one into the store, without reading experts that a page file has."""

from __future__ import annotations

import mmap
import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.stores.disk import residency
from fluxmoe.stores.disk.pagefile import MAGIC, PREFIX, VERSION
from fluxmoe.testing import checkpoints
from tests.vllm.conftest import EAGER, KV_BYTES, PAGES, Outputs, config, outputs, prompts

pytestmark = pytest.mark.vllm

#: The experts of one layer take 96 MiB and a page takes 6 MiB, far more than any other growth.
LARGE = {"hidden_size": 1024, "moe_intermediate_size": 1024, "num_hidden_layers": 2}
LARGE_PAGE = 3 * 1024 * 1024 * 2
LAYER = 16 * LARGE_PAGE


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("large") / "model", "qwen3-moe", **LARGE)


def budget(slots: int, **settings: Any) -> dict[str, Any]:
    memory = {"budget": slots * LARGE_PAGE + KV_BYTES, "experts": {"target": slots * LARGE_PAGE}}
    return {"memory": {**memory, "frame": 4096}, **settings}


@contextmanager
def peak_of(engine: ChildEngine) -> Iterator[list[int]]:
    """Yield a list for the peak growth, in bytes, of the engine's anonymous and shared memory."""
    found: list[int] = []
    ended = threading.Event()
    before = memory_of(engine)

    def watch() -> None:
        highest = before
        while not ended.is_set():
            highest = max(highest, memory_of(engine))
            time.sleep(0.01)
        found.append(highest - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def memory_of(engine: ChildEngine) -> int:
    status = Path(f"/proc/{engine._process.pid}/status").read_text()
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(sizes[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def resident(path: Path) -> int:
    """Return the bytes of a file that are in the page cache."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        pages = range(0, size, mmap.PAGESIZE)
        return mmap.PAGESIZE * sum(residency.cached(file.fileno(), at, 1) for at in pages)


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_start_holds_one_expert_and_the_second_reads_none(
    borrowed: ChildEngine, large: Path, tmp_path: Path
) -> None:
    def paged(folder: str) -> dict[str, Any]:
        return budget(slots, stores=[{"kind": "file", "path": str(tmp_path / folder)}])

    (weights,) = large.glob("*.safetensors")
    slots, batch, answers, peaks, reads = 16, prompts(4, tokens=6), [], [], []
    borrowed.restart(model=large, kv_cache_memory_bytes=KV_BYTES, **EAGER)
    answers.append(borrowed.generate(batch).logprobs)
    # This engine lets the allocators grow; the next engines have the same size.
    borrowed.restart(model=large, fluxmoe=paged("warm"), **EAGER)
    for _ in range(2):
        forget(weights)
        dropped = not resident(weights)  # some file systems keep everything
        with peak_of(borrowed) as peak:
            borrowed.restart(model=large, fluxmoe=paged("pages"), **EAGER)
        peaks += peak
        reads.append(resident(weights))
        run = borrowed.generate(batch)
        answers.append(run.logprobs)
        assert run.stats["misses"] > 0
    assert answers[0] == answers[1] == answers[2]
    assert max(peaks) < LAYER / 2
    others = weights.stat().st_size - 2 * LAYER
    if dropped:
        assert reads[1] < others + LAYER / 2 < 2 * LAYER <= reads[0]
    # The negative control for the peak: dummy weights fill the model's parameters.
    with peak_of(borrowed) as peak:
        borrowed.restart(model=large, fluxmoe=paged("dummy"), load_format="dummy", **EAGER)
    assert peak[0] > LAYER


def test_an_interrupted_start_is_continued(
    borrowed: ChildEngine, checkpoint: Path, stock_outputs: Outputs, tmp_path: Path
) -> None:
    fluxmoe = config(20, stores=[{"kind": "file", "path": str(tmp_path)}])
    borrowed.restart(model=checkpoint, fluxmoe=fluxmoe, **EAGER)
    (whole,) = tmp_path.iterdir()
    data = whole.read_bytes()
    # The file of a process that was killed halfway: an incomplete header, and half of the index.
    index = np.frombuffer(data[4096:], np.uint64, PAGES * 2 * 4).reshape(PAGES, 2, 4).copy()
    index[PAGES // 2 :] = 0
    head = data[20:4096].rstrip(b"\0")
    head = head[: head.rindex(b'"index_crc"')] + b'"index_crc":null}'

    prefix = PREFIX.pack(MAGIC, VERSION, len(head), zlib.crc32(head))
    part = whole.with_name(f"{whole.stem}-killed.part")
    part.write_bytes(
        (prefix + head).ljust(4096, b"\0") + index.tobytes() + data[4096 + index.nbytes :]
    )
    whole.unlink()
    inode = part.stat().st_ino
    borrowed.restart(model=checkpoint, fluxmoe=fluxmoe, **EAGER)
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
    assert whole.stat().st_ino == inode  # continued, not written again
    assert outputs(borrowed) == stock_outputs


def test_other_weights_at_the_same_place_are_not_taken_for_the_old_ones(
    borrowed: ChildEngine, tmp_path: Path
) -> None:
    """The negative control for the key: with a constant key, the old weights would be served."""
    fluxmoe = config(20, stores=[{"kind": "file", "path": str(tmp_path / "pages")}])
    batch, answers = prompts(4, tokens=6), []
    model = tmp_path / "model"
    for seed in (1, 2):
        checkpoints.write(model, "qwen3-moe", seed=seed)
        for path in model.iterdir():
            os.utime(path, (1, 1))
        for settings in ({"kv_cache_memory_bytes": KV_BYTES}, {"fluxmoe": fluxmoe}):
            borrowed.restart(model=model, **settings, **EAGER)
            answers.append(borrowed.generate(batch).logprobs)
    assert answers[0] == answers[1] != answers[2] == answers[3]


@pytest.mark.parametrize("kind", ["host", "file"])
def test_dummy_weights_are_stocks(borrowed: ChildEngine, tmp_path: Path, kind: str) -> None:
    store = {"kind": "host"} if kind == "host" else {"kind": "file", "path": str(tmp_path)}
    batch, answers = prompts(4, tokens=6), []
    for settings in (
        {"kv_cache_memory_bytes": KV_BYTES},
        {"fluxmoe": config(20, stores=[store])},
        {"fluxmoe": config(20, stores=[store])},
    ):
        borrowed.restart(load_format="dummy", **settings, **EAGER)
        answers.append(borrowed.generate(batch).logprobs)
    assert answers[0] == answers[1] == answers[2]
