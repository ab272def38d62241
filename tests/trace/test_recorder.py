"""The recorder's ring: no event is lost, no memory is retained, and the engine never fails."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fluxmoe.core.types import Phase
from fluxmoe.errors import TraceError
from fluxmoe.trace import StepRows, TraceMeta, TraceReader
from fluxmoe.trace import recorder as module
from fluxmoe.trace.recorder import Recorder

META = TraceMeta("m", num_layers=3, experts_per_layer=16, top_k=2, page_bytes=None, source="test")


def trace(path: Path) -> list[tuple[int, int, int, list[int]]]:
    return [(s, la, int(p), ids.tolist()) for s, la, p, ids in TraceReader(path).events()]


def test_events_of_all_sizes_cross_the_chunks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_IDS", 64)
    rng = np.random.default_rng(0)
    written = []
    ids = np.empty(0, np.int64)
    with Recorder(tmp_path / "t", META) as recorder:
        for step in range(300):
            for layer in range(3):
                # Occasionally a long prompt, which does not fit into one chunk.
                tokens = int(rng.integers(1, 200 if step % 50 == 7 else 20))
                ids = np.resize(ids, (tokens, 2))  # the engine reuses its buffers
                ids[:] = rng.integers(0, 16, (tokens, 2))
                recorder.observe(-1, layer, ids.ravel(), Phase(step % 2))
                written.append((step, layer, step % 2, ids.ravel().tolist()))
    assert trace(tmp_path / "t") == written
    assert recorder.steps == 300 and recorder.done


def test_a_slow_disk_makes_the_engine_wait(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_IDS", 4)
    go = threading.Event()
    recorder = Recorder(tmp_path / "t", META)
    extend = recorder._writer.extend
    monkeypatch.setattr(recorder._writer, "extend", lambda *args: (go.wait(), extend(*args)))
    count = [0]

    def engine() -> None:
        for step in range(40):
            recorder.observe(step, 0, np.asarray([1, 2]), Phase.DECODE)
            count[0] += 1

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join(0.3)
    # A chunk holds two events. All four chunks are full, and the writer has one of them.
    assert thread.is_alive() and count[0] == 2 * module._CHUNKS
    go.set()
    thread.join()
    recorder.close()
    assert len(trace(tmp_path / "t")) == 40


def test_a_reset_of_the_engine_does_not_end_a_recording(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t", META) as recorder:
        for step in (5, 6, 0, 1):  # the pager was reset after two steps
            for layer in (0, 2):
                recorder.observe(step, layer, np.asarray([3, 4]), Phase.DECODE)
    assert [(s, la) for s, la, _, _ in trace(tmp_path / "t")] == [
        (step, layer) for step in range(4) for layer in (0, 2)
    ]


def test_rows_are_asked_for_once_a_step(tmp_path: Path) -> None:
    asked = []

    def rows(tokens: int) -> StepRows | None:
        asked.append(tokens)
        if len(asked) == 3:
            return None
        return StepRows(np.arange(2, dtype=np.int32), np.asarray([0, 1], np.int8))

    with Recorder(tmp_path / "t", META, rows=rows) as recorder:
        for step in range(3):
            recorder.first_request = 10 * step
            for layer in range(3):
                recorder.observe(step, layer, np.arange(6), Phase.PREFILL)  # one token has no row
    found = pq.ParquetFile(tmp_path / "t").read().to_pylist()
    assert asked == [3, 3, 3]
    assert [row["request"] for row in found] == [0, 1, -1] * 3 + [10, 11, -1] * 3 + [-1] * 9
    assert [row["phase"] for row in found] == [0, 1, 0] * 6 + [0] * 9


def test_max_steps(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t", META, max_steps=2) as recorder:
        done = []
        for step in range(4):
            for layer in range(3):
                recorder.observe(step, layer, np.asarray([1, 2]), Phase.DECODE)
                done.append(recorder.done)
    assert done == [False] * 5 + [True] * 7
    assert len(trace(tmp_path / "t")) == 6


def test_notes_belong_to_the_next_event_only(tmp_path: Path) -> None:
    with (
        pytest.raises(TraceError, match=r"an event lacks weights.*eager"),
        Recorder(tmp_path / "t", META, columns=["weights"]) as recorder,
    ):
        recorder.note(np.ones((1, 2), np.float16), None)
        recorder.observe(0, 0, np.asarray([1, 2]), Phase.DECODE)
        recorder.observe(0, 1, np.asarray([1, 2]), Phase.DECODE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "message"), [([1, 2, 3], "recording failed"), ([1, 16], "expert 16 is not within")]
)
def test_what_cannot_be_written_is_told_at_the_end(tmp_path: Path, ids, message) -> None:
    recorder = Recorder(tmp_path / "t", META)
    for step in range(3):
        recorder.observe(step, 0, np.asarray(ids), Phase.DECODE)
    with pytest.raises(TraceError, match=message):
        recorder.close()
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    assert not any(thread.name == "fluxmoe-trace" for thread in threading.enumerate())


def test_giving_up(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Recorder(tmp_path / "t", META) as recorder:
        recorder.observe(0, 0, np.asarray([1, 2]), Phase.DECODE)
        raise KeyError
    assert list(tmp_path.iterdir()) == []
