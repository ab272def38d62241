"""The trace format: written traces are read back, and damaged ones are rejected."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmoe.core.types import Phase
from fluxmoe.errors import TraceError
from fluxmoe.sim.events import Events
from fluxmoe.trace import OPTIONAL, StepRows, TraceMeta, TraceReader, TraceWriter, reader
from fluxmoe.trace.synth import Workload, write

META = TraceMeta("m", num_layers=2, experts_per_layer=8, top_k=2, page_bytes=4096, source="test")
COLUMNS = {
    "step": ([0, 0, 0, 1], pa.int32()),
    "layer": ([0, 0, 1, 0], pa.int16()),
    "token": ([0, 1, 0, 0], pa.int32()),
    "phase": ([1, 1, 1, 1], pa.int8()),
    "request": ([-1, -1, -1, -1], pa.int32()),
    "experts": ([[0, 1], [1, 2], [7, 3], [5, 0]], pa.list_(pa.int16())),
}
DOCUMENT = {"version": 1, "model": "m", "num_layers": 2, "experts_per_layer": 8, "top_k": 2,
            "page_bytes": 4096, "source": "test"}  # fmt: skip


def make(path, document=DOCUMENT, without=(), **columns):
    """Make a trace by hand, with some parts changed."""
    chosen = {name: c for name, c in {**COLUMNS, **columns}.items() if name not in without}
    table = pa.table({name: pa.array(values, type_) for name, (values, type_) in chosen.items()})
    if document is not None:
        raw = document if isinstance(document, str) else json.dumps(document)
        table = table.replace_schema_metadata({"fluxmoe": raw})
    pq.write_table(table, path, compression="zstd")
    return path


def read(path):
    return [(s, la, p, ids.tolist()) for s, la, p, ids in TraceReader(path).events()]


def test_a_trace_made_by_hand(tmp_path):
    path = make(tmp_path / "t")
    assert TraceReader(path).meta == META
    assert read(path) == [
        (0, 0, Phase.DECODE, [0, 1, 1, 2]),
        (0, 1, Phase.DECODE, [7, 3]),
        (1, 0, Phase.DECODE, [5, 0]),
    ]


def test_a_batch_that_mixes_phases_counts_as_prefill(tmp_path):
    path = make(tmp_path / "t", phase=([1, 0, 1, 1], pa.int8()))
    assert [phase for _, _, phase, _ in read(path)] == [0, 1, 1]


events_lists = st.lists(
    st.tuples(
        st.booleans(),  # a new step
        st.integers(1, 2),  # layers to advance, modulo 3
        st.sampled_from(Phase),
        st.lists(st.lists(st.integers(0, 7), min_size=2, max_size=2), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(events_lists, st.integers(1, 20), st.integers(1, 9))
def test_round_trip_whatever_the_groups_and_batches(tmp_path_factory, drawn, group, batch):
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    meta = TraceMeta("m", 3, 8, 2, None, "test")
    step, layer, written = 0, -1, []
    with TraceWriter(path, meta, group_rows=group) as writer:
        for new_step, further, phase, tokens in drawn:
            layer += further
            if new_step or layer >= 3:
                step, layer = step + 1, layer % 3
            writer.append(step, layer, np.asarray(tokens, np.int32), phase)
            written.append((step, layer, phase, [i for ids in tokens for i in ids]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "GROUP_ROWS", batch)  # events cross batch boundaries
        assert read(path) == written
        events = Events.load(path)
    assert [
        (s, la, p, events.ids[at].tolist()) for s, la, p, at in events
    ] == written  # fmt: skip
    assert events.largest == max(len(set(ids)) for *_, ids in written)


def test_the_file_is_what_the_format_says(tmp_path):
    path = tmp_path / "t.parquet"
    with TraceWriter(path, META) as writer:
        writer.append(3, 1, np.asarray([[4, 2], [2, 0]]))
    file = pq.ParquetFile(path)
    assert file.schema_arrow.names == list(COLUMNS)
    assert [field.type for field in file.schema_arrow] == [type_ for _, type_ in COLUMNS.values()]
    assert json.loads(file.schema_arrow.metadata[b"fluxmoe"]) == DOCUMENT
    assert {file.metadata.row_group(0).column(i).compression for i in range(6)} == {"ZSTD"}
    assert file.read().to_pylist() == [
        {"step": 3, "layer": 1, "token": 0, "phase": 1, "request": -1, "experts": [4, 2]},
        {"step": 3, "layer": 1, "token": 1, "phase": 1, "request": -1, "experts": [2, 0]},
    ]


def test_padding_is_left_out_and_the_caller_may_reuse_its_array(tmp_path):
    path = tmp_path / "t.parquet"
    ids = np.asarray([1, 2, -1, -1, 3, -1], np.int64)
    with TraceWriter(path, META) as writer:
        writer.append(0, 0, ids)
        ids[:] = -1
        writer.append(0, 1, ids)  # an event with only padding is still an event
    assert read(path) == [(0, 0, 1, [1, 2, 3]), (0, 1, 1, [])]


# --- the writer's errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "layer", "ids", "message"),
    [
        (0, 0, [1, 2], "cannot follow"),
        (1, 2, [1, 2], "cannot follow"),
        (1, 0, [1, 2, 3], "not a multiple of top_k = 2"),
        (1, 0, [1, 8], "expert 8 is not within 0…7"),
    ],
)
def test_a_wrong_event_leaves_no_file(tmp_path, step, layer, ids, message):
    path = tmp_path / "t.parquet"
    with pytest.raises(TraceError, match=message), TraceWriter(path, META) as writer:
        writer.append(0, 0, np.asarray([0, 1]))
        writer.append(step, layer, np.asarray(ids))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_keeps_the_old_file(tmp_path):
    path = make(tmp_path / "t.parquet")
    before = path.read_bytes()
    writing = TraceWriter(path, META, replace=True)
    with pytest.raises(KeyboardInterrupt), writing as writer:
        writer.append(0, 0, np.asarray([0, 1]))
        raise KeyboardInterrupt
    assert [path.read_bytes()] == [before]
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_without_events_is_not_written(tmp_path):
    with pytest.raises(TraceError, match="no events"), TraceWriter(tmp_path / "t", META):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(TraceError, match="cannot write"):
        TraceWriter(tmp_path / "no" / "such" / "t.parquet", META)


# --- the reader's errors -----------------------------------------------------------------------


def refused(path, message):
    with pytest.raises(TraceError, match=message) as caught:
        Events.load(path)
    assert str(path) in str(caught.value)
    assert caught.value.code == "FM501"


def test_no_file(tmp_path):
    refused(tmp_path / "none", "no such file")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"step,layer\n0,0\n" * 20])
def test_not_parquet(tmp_path, content):
    path = tmp_path / "t"
    path.write_bytes(content)
    refused(path, "not a Parquet file")


def test_truncated(tmp_path):
    path = make(tmp_path / "t")
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, "not a Parquet file, or truncated")


def test_damaged_in_the_middle(tmp_path):
    path = tmp_path / "t"
    write(Workload(4, 16, 4, 50, 4), path)
    raw = bytearray(path.read_bytes())
    middle = slice(len(raw) // 4, len(raw) // 2)
    raw[middle] = b"\x55" * len(raw[middle])
    path.write_bytes(raw)
    refused(path, "damaged data")


def test_a_directory(tmp_path):
    refused(tmp_path, "not a Parquet file")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "no metadata key 'fluxmoe'"),
        ("{", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ({**DOCUMENT, "version": 2}, "version 2; this version of FluxMoE reads 1"),
        ({k: v for k, v in DOCUMENT.items() if k != "version"}, "version None"),
        ({**DOCUMENT, "num_layers": 0}, "num_layers is 0"),
        ({**DOCUMENT, "num_layers": 2.5}, "num_layers is 2.5"),
        ({k: v for k, v in DOCUMENT.items() if k != "experts_per_layer"}, "experts_per_layer is 0"),
        ({**DOCUMENT, "top_k": "two"}, "top_k is 'two'"),
        ({**DOCUMENT, "top_k": 9}, "top_k is 9, but a layer has 8 experts"),
        ({**DOCUMENT, "page_bytes": -1}, "page_bytes is -1"),
    ],
)
def test_metadata(tmp_path, document, message):
    refused(make(tmp_path / "t", document), message)


def test_unknown_page_size_is_no_error(tmp_path):
    path = make(tmp_path / "t", {**DOCUMENT, "page_bytes": None})
    assert TraceReader(path).meta.page_bytes is None


@pytest.mark.parametrize("column", list(COLUMNS))
def test_missing_column(tmp_path, column):
    refused(make(tmp_path / "t", without=[column]), f"column '{column}' is missing")


@pytest.mark.parametrize(
    ("column", "type_"),
    [("step", pa.int64()), ("layer", pa.int32()), ("experts", pa.list_(pa.int32())),
     ("phase", pa.int16())],
)  # fmt: skip
def test_wrong_type(tmp_path, column, type_):
    values = COLUMNS[column][0]
    refused(make(tmp_path / "t", **{column: (values, type_)}), f"column '{column}' has type")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("experts", [[0, 1], [1, 8], [7, 3], [5, 0]], "row 1: expert 8 is not within 0…7"),
        ("experts", [[0, 1], [1, 2], [7, 3], [-1, 0]], "row 3: expert -1"),
        ("experts", [[0, 1], [1, 2], [7, 3, 4], [0, 1]], "row 2: more than top_k = 2"),
        ("experts", [[0, 1], None, [7, 3], [0, 1]], "a value is missing"),
        ("experts", [[0, 1], [None, 2], [7, 3], [0, 1]], "a value is missing"),
        ("layer", [0, 0, 2, 0], r"row 2: the layer is not within 0…1"),
        ("layer", [-1, 0, 1, 0], r"row 0: the layer"),
        ("phase", [1, 1, 2, 1], "row 2: the phase"),
        ("step", [-1, 0, 0, 1], "row 0: the step is negative"),
        ("step", [0, None, 0, 1], "a value is missing"),
        ("step", [0, 0, 1, 0], "row 3: not sorted"),
        ("layer", [1, 0, 1, 0], "row 1: not sorted"),
        ("token", [1, 0, 0, 0], "row 1: not sorted"),
    ],
)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_wrong_rows(tmp_path, monkeypatch, column, values, message, batch):
    monkeypatch.setattr(reader, "GROUP_ROWS", batch)
    refused(make(tmp_path / "t", **{column: (values, COLUMNS[column][1])}), message)


def test_empty(tmp_path):
    refused(make(tmp_path / "t", **{k: ([], t) for k, (_, t) in COLUMNS.items()}), "no events")


# --- optional columns --------------------------------------------------------------------------


def test_weights_predictions_requests_and_phases(tmp_path):
    path = tmp_path / "t"
    rows = StepRows(np.asarray([7, 9], np.int32), np.asarray([0, 1], np.int8))
    with TraceWriter(path, META, columns=OPTIONAL) as writer:
        writer.append(0, 0, np.asarray([[1, 2], [3, -1]]), Phase.PREFILL, rows=rows,
                      weights=np.asarray([[0.75, 0.25], [0.5, 0.1]]),
                      predicted=np.asarray([[4, 5, 6], [0, -1, -1]]))  # fmt: skip
        writer.append(0, 1, np.asarray([[1, 2], [5, 6]]), Phase.DECODE, weights=np.ones((2, 2)),
                      predicted=np.zeros((2, 0), np.int64))  # fmt: skip
    file = pq.ParquetFile(path)
    assert file.schema_arrow.field("weights").type == pa.list_(pa.float16())
    assert file.schema_arrow.field("predicted").type == pa.list_(pa.int16())
    found = file.read().to_pylist()
    assert [row["request"] for row in found] == [7, 9, -1, -1]
    assert [row["phase"] for row in found] == [0, 1, 1, 1]
    assert [row["weights"] for row in found] == [[0.75, 0.25], [0.5], [1, 1], [1, 1]]
    assert [row["predicted"] for row in found] == [[4, 5, 6], [0], [], []]
    trace = TraceReader(path)
    assert trace.columns == ("weights", "predicted")
    first, last = trace.blocks(predicted=True)  # the last event is alone in its block
    assert first.guess_offsets.tolist() == [0, 4]
    assert first.guesses.tolist() == [4, 5, 6, 0]
    assert last.guess_offsets.tolist() == [0, 0]
    offsets, ids = Events.load(path).predicted
    assert (offsets.tolist(), ids.tolist()) == ([0, 4, 4], [4, 5, 6, 0])
    first, _ = trace.rows(["request", "weights"])
    assert first["request"].tolist() == [7, 9]
    assert first.lists["weights"][1].tolist() == [0.75, 0.25, 0.5]


def test_a_trace_without_predictions_has_none(tmp_path):
    path = make(tmp_path / "t")
    assert TraceReader(path).columns == ()
    assert Events.load(path).predicted is None


def test_an_event_without_what_the_file_promises(tmp_path):
    with (
        pytest.raises(TraceError, match="an event lacks weights"),
        TraceWriter(tmp_path / "t", META, columns=["weights"]) as writer,
    ):
        writer.append(0, 0, np.asarray([1, 2]), weights=np.ones(2))
        writer.append(0, 1, np.asarray([1, 2]))


@pytest.mark.parametrize(
    ("column", "values", "type_", "message"),
    [
        ("weights", [[1, 0], [1], [1, 0], [1, 0]], pa.list_(pa.float16()), "row 1: not as many"),
        ("weights", [[1, 0]] * 4, pa.list_(pa.float32()), "column 'weights' has type"),
        ("predicted", [[], [3], [8], []], pa.list_(pa.int16()), "row 2: expert 8 is not within"),
        ("predicted", [[], None, [8], []], pa.list_(pa.int16()), "a value is missing"),
    ],
)
def test_wrong_optional_columns(tmp_path, column, values, type_, message):
    values = [v and [np.float16(x) if "float" in str(type_) else x for x in v] for v in values]
    path = make(tmp_path / "t", **{column: (values, type_)})
    with pytest.raises(TraceError, match=message):
        list(TraceReader(path).rows([column]))


def test_padding_tokens_are_dropped_but_never_a_whole_event(tmp_path):
    path = tmp_path / "t"
    with TraceWriter(path, META) as writer:
        writer.append(0, 0, np.asarray([[-1, -1], [1, 2], [-1, -1]]))
        writer.append(0, 1, np.asarray([[-1, -1], [-1, -1]]))
    rows = pq.ParquetFile(path).read().to_pylist()
    assert [(r["layer"], r["token"], r["experts"]) for r in rows] == [(0, 1, [1, 2]), (1, 0, [])]


# --- streaming ---------------------------------------------------------------------------------


def test_neither_writer_nor_reader_holds_more_than_a_group(tmp_path, monkeypatch):
    path, tokens, group = tmp_path / "t", 10, 100
    ids = np.tile(np.asarray([[1, 2]]), (tokens, 1))
    most = 0
    with TraceWriter(path, META, group_rows=group) as writer:
        for step in range(500):
            writer.append(step, 0, ids)
            most = max(most, writer._rows)
    assert most < group + tokens
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups == 500 * tokens // group
    monkeypatch.setattr(reader, "GROUP_ROWS", group)
    sizes = [len(rows) for rows in TraceReader(path).rows()]
    assert sum(sizes) == 500 * tokens
    # A group and one more event, because the last event of a batch waits for the next batch.
    assert max(sizes) <= group + tokens


def test_a_large_trace_passes_through_little_memory(tmp_path):
    """Read 9.6 million expert ids (19 MB as int16, 77 MB as int64) with 32 MB of extra memory."""
    path = tmp_path / "t"
    program = (
        "import sys, resource, numpy as np, pyarrow as pa\n"
        "from fluxmoe.trace import TraceMeta, TraceReader, TraceWriter, reader\n"
        "meta = TraceMeta('m', 48, 128, 8, 1, 'test')\n"
        "reader.GROUP_ROWS = 1 << 13\n"
        "def run(path, steps):\n"
        "    rng = np.random.default_rng(0)\n"
        "    with TraceWriter(path, meta, replace=True, group_rows=1 << 13) as writer:\n"
        "        for step in range(steps):\n"
        "            ids = rng.integers(0, 128, (48, 250, 8), np.int16)\n"
        "            for layer in range(48): writer.append(step, layer, ids[layer])\n"
        "    return sum(block.ids.size for block in TraceReader(path).blocks())\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(sys.argv[1], 5); before = peak()\n"
        "assert run(sys.argv[1], 100) == 100 * 48 * 250 * 8\n"
        "assert peak() - before < 32 << 10, (before, peak())\n"
    )
    subprocess.run([sys.executable, "-c", program, path], check=True)


# --- existing files and failed writes ----------------------------------------------------------


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "ParquetWriter", refuse)
    with pytest.raises(TraceError, match="cannot write a trace: No space left on device"):
        TraceWriter(tmp_path / "t", META)


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    with pytest.raises(TraceError, match="No space left"), TraceWriter(tmp_path / "t", META) as w:
        w.append(0, 0, np.asarray([1, 2]))

        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(w._file, "write_table", refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_b9_weights_that_are_no_numbers(tmp_path, bad):
    ids, weights = np.asarray([[0, 1], [2, -1]]), np.asarray([[0.5, 0.5], [1, bad]])
    with TraceWriter(tmp_path / "t", META, columns=["weights"]) as writer:
        writer.append(0, 0, ids, weights=weights)  # the weight of a padding entry is ignored
    weights[1, 0] = bad
    refused = pytest.raises(TraceError, match="not a finite number")
    with refused, TraceWriter(tmp_path / "u", META, columns=["weights"]) as writer:
        writer.append(0, 0, ids, weights=weights)
    table = pq.read_table(tmp_path / "t")
    column = pa.array([[0.5, 0.5], [bad]], table.schema.field("weights").type)
    at = table.schema.get_field_index("weights")
    pq.write_table(table.set_column(at, table.schema.field(at), column), tmp_path / "v")
    with pytest.raises(TraceError, match="row 1: a routing weight is not a finite number"):
        list(TraceReader(tmp_path / "v").rows(["weights"]))
