"""Foreign formats, read from files in the layouts documented by their authors."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fluxmoe.errors import ConfigError, TraceError
from fluxmoe.trace import TraceReader
from fluxmoe.trace.formats import FORMATS, Options, convert, detect


def rows(path):
    """Read (step, layer, token, phase, request, experts[, weights]) of every row."""
    return [tuple(row.values()) for row in pq.ParquetFile(path).read().to_pylist()]


# --- FLAME-MoE ---------------------------------------------------------------------------------


def write_flame(folder, layers=(2, 3), tokens=50_000, top_k=6, kind=None, seed=0):
    """Write files as in the dataset's README: descending scores (float16) and indices (int16)."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    written = {}
    for layer in layers:
        ids = rng.integers(0, 64, (tokens, top_k)).astype(np.int16)
        scores = -np.sort(-rng.random((tokens, top_k)).astype(np.float16))
        if kind == "fixed":
            columns = [pa.FixedSizeListArray.from_arrays(a.ravel(), top_k) for a in (scores, ids)]
        else:
            ends = np.arange(0, tokens * top_k + 1, top_k, np.int32)
            columns = [pa.ListArray.from_arrays(ends, a.ravel()) for a in (scores, ids)]
        table = pa.table(columns, names=["scores", "indices"])
        pq.write_table(table, folder / f"layer_{layer:02}.parquet", row_group_size=7_000)
        written[layer] = ids, scores
    return written


@pytest.mark.parametrize("kind", ["list", "fixed"])
def test_flame(tmp_path, kind):
    written = write_flame(tmp_path / "iter_0540", tokens=20_000, kind=kind)
    assert detect(tmp_path / "iter_0540").name == "flame"
    meta = convert(tmp_path / "iter_0540", tmp_path / "t", model="FLAME-MoE-290M", max_steps=300,
                   options=Options(step_tokens=64), experts=64, page_bytes=7)  # fmt: skip
    assert (meta.model, meta.num_layers, meta.experts_per_layer, meta.top_k, meta.page_bytes,
            meta.source) == ("FLAME-MoE-290M", 2, 64, 6, 7, "flame")  # fmt: skip
    found = rows(tmp_path / "t")
    assert len(found) == 300 * 2 * 64
    for step, layer, token, phase, request, experts, weights in (found[0], found[64], found[-1]):
        ids, scores = written[layer + 2]
        assert experts == ids[step * 64 + token].tolist()
        assert weights == scores[step * 64 + token].tolist()
        assert (phase, request) == (0, -1)
    assert found[-1][:3] == (299, 1, 63)


def test_flame_one_token_at_a_time_and_the_last_step_may_be_short(tmp_path):
    folder = tmp_path / "iter"
    write_flame(folder, layers=(2,), tokens=5)
    convert(folder / "layer_02.parquet", tmp_path / "one")
    assert [(r[0], r[2], r[3]) for r in rows(tmp_path / "one")] == [(i, 0, 1) for i in range(5)]
    convert(folder, tmp_path / "two", options=Options(step_tokens=2))
    assert [r[0] for r in rows(tmp_path / "two")] == [0, 0, 1, 1, 2]


def test_flame_errors(tmp_path):
    folder = tmp_path / "iter"
    write_flame(folder, tokens=10)
    write_flame(folder, layers=(3,), tokens=11)
    with pytest.raises(TraceError, match="different numbers of rows"):
        convert(folder, tmp_path / "t")
    file = tmp_path / "samples.parquet"
    pq.write_table(pa.table({"token_id": pa.array([1, 2], pa.int32())}), file)
    with pytest.raises(TraceError, match=r"columns token_id, not indices.*FLAME-MoE: layer_NN"):
        convert(file, tmp_path / "t")
    file.write_bytes((folder / "layer_02.parquet").read_bytes()[:-20])
    with pytest.raises(TraceError, match="not a valid Parquet file"):
        convert(file, tmp_path / "t")
    pq.write_table(pa.table({"indices": [[1, 2], [3]]}), file)
    with pytest.raises(TraceError, match="different lengths"):
        convert(file, tmp_path / "t")
    pq.write_table(pa.table({"indices": [1, 2]}), file)
    with pytest.raises(TraceError, match="instead of lists"):
        convert(file, tmp_path / "t")
    assert not (tmp_path / "t").exists()


# --- MoE_expert_selection_trace ----------------------------------------------------------------

SELECTION = [
    {"0": None, "1": [[3, 1], [0, 2], [5, 1]], "3": [[0, 1], [1, 2], [2, 3]]},
    {"0": None, "1": [[4, 2]], "3": [[3, 0]]},
    {"0": None, "1": [[5, 0]], "3": [[1, 0]]},
]


def test_selection(tmp_path):
    file = tmp_path / "0.json"
    file.write_text(json.dumps(SELECTION))
    assert detect(file).name == "selection"
    meta = convert(file, tmp_path / "t")
    assert (meta.num_layers, meta.experts_per_layer, meta.top_k) == (2, 6, 2)
    assert rows(tmp_path / "t") == [
        (0, 0, 0, 0, 0, [3, 1]), (0, 0, 1, 0, 0, [0, 2]), (0, 0, 2, 0, 0, [5, 1]),
        (0, 1, 0, 0, 0, [0, 1]), (0, 1, 1, 0, 0, [1, 2]), (0, 1, 2, 0, 0, [2, 3]),
        (1, 0, 0, 1, 0, [4, 2]), (1, 1, 0, 1, 0, [3, 0]),
        (2, 0, 0, 1, 0, [5, 0]), (2, 1, 0, 1, 0, [1, 0]),
    ]  # fmt: skip


def test_a_folder_of_selections_is_one_request_after_the_other(tmp_path):
    folder = tmp_path / "mmlu"
    folder.mkdir()
    for name in ("1.json", "2.json"):
        (folder / name).write_text(json.dumps(SELECTION))
    assert detect(folder).name == "selection"
    convert(folder, tmp_path / "t", max_steps=5)
    found = rows(tmp_path / "t")
    assert sorted({(row[0], row[4]) for row in found}) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]
    assert {row[3] for row in found if row[0] in (0, 3)} == {0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not valid JSON"),
        ('{"0": 1}', "not a list of steps"),
        ("[3]", "element 0"),
        ('[{"x": [[1]]}]', "layer 'x' is not a number"),
        ('[{"0": [[1, 2], [3]]}]', "different numbers of experts"),
        ('[{"0": [1, 2]}]', "not one list of expert numbers per token"),
        ('[{"0": [[1.5]]}]', "not one list of expert numbers per token"),
        ('[{"0": null}]', "no experts were routed to"),
    ],
)
def test_selection_errors(tmp_path, content, message):
    file = tmp_path / "0.json"
    file.write_text(content)
    with pytest.raises(TraceError, match=message):
        convert(file, tmp_path / "t", "selection")


# --- vLLM --------------------------------------------------------------------------------------


def routed(tokens, layers=4, top_k=3, seed=0):
    """Make an array like ``CompletionOutput.routed_experts``: layer 0 is dense, with zeros."""
    ids = np.random.default_rng(seed).integers(0, 40, (tokens, layers, top_k)).astype(np.uint8)
    ids[:, 0] = 0
    return ids


def test_vllm(tmp_path):
    array = routed(9)
    np.save(tmp_path / "r.npy", array)
    assert detect(tmp_path / "r.npy").name == "vllm"
    meta = convert(tmp_path / "r.npy", tmp_path / "t", options=Options(prompt_tokens=6))
    assert (meta.num_layers, meta.top_k) == (3, 3)
    found = rows(tmp_path / "t")
    assert len(found) == 9 * 3
    assert [row[:4] for row in found[:6]] == [(0, 0, token, 0) for token in range(6)]
    assert [row[:5] for row in found[-3:]] == [(3, layer, 0, 1, 0) for layer in range(3)]
    assert [row[5] for row in found[-3:]] == array[8, 1:].tolist()


def test_several_requests_of_vllm(tmp_path):
    arrays = {"a": routed(3, seed=1), "b": routed(2, seed=2).astype(np.int32)}
    np.savez(tmp_path / "r.npz", **arrays)
    assert detect(tmp_path / "r.npz").name == "vllm"
    convert(tmp_path / "r.npz", tmp_path / "t")
    found = rows(tmp_path / "t")
    assert sorted({(row[0], row[3], row[4]) for row in found}) == [
        (0, 1, 0), (1, 1, 0), (2, 1, 0), (3, 1, 1), (4, 1, 1),
    ]  # fmt: skip


def test_vllm_errors(tmp_path):
    file = tmp_path / "r.npy"
    for array, message in (
        (np.zeros((3, 2), np.uint8), "shape"),
        (np.zeros((3, 2, 2)), "float64 of shape"),
        (np.zeros((3, 2, 2), np.uint8), "no experts were routed to"),
    ):
        np.save(file, array)
        with pytest.raises(TraceError, match=message):
            convert(file, tmp_path / "t")
    np.save(file, np.asarray([{}], object), allow_pickle=True)
    with pytest.raises(TraceError, match=r"damaged or contains objects") as caught:
        convert(file, tmp_path / "t")
    assert "allow_pickle" not in str(caught.value)
    np.save(file, routed(50))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(TraceError, match="damaged"):
        convert(file, tmp_path / "t")


def test_b9_tokens_of_a_cached_prefix_are_left_out(tmp_path):
    """vLLM leaves the rows of tokens from a cached prefix at zero."""
    array = routed(9) | 1
    array[:, 0], array[:4] = 0, 0
    np.save(tmp_path / "r.npy", array)
    for prompt, steps in ((6, [0, 0, 1, 2, 3]), (0, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 3, 4])):
        convert(tmp_path / "r.npy", tmp_path / "t", options=Options(prompt_tokens=prompt),
                replace=True)  # fmt: skip
        found = rows(tmp_path / "t")
        assert [row[0] for row in found if row[1] == 0] == steps
        assert [row[5] for row in found if row[1] == 1] == array[4:, 2].tolist()
        assert {row[3] for row in found if row[0] == 0} == {0 if prompt == 6 else 1}


def test_b9_zeros_are_judged_per_row(tmp_path):
    array = routed(4, layers=3) | 1
    array[:, 0] = 0
    array[1, 2] = 0  # only one layer of one token
    np.save(tmp_path / "r.npy", array)
    meta = convert(tmp_path / "r.npy", tmp_path / "t", options=Options(prompt_tokens=4))
    assert meta.num_layers == 2
    found = [(row[1], row[2], row[5]) for row in rows(tmp_path / "t")]
    assert found == [
        *((0, token, array[token, 1].tolist()) for token in range(4)),
        *((1, token, array[token, 2].tolist()) for token in (0, 2, 3)),
    ]


def test_b9_a_zero_of_a_top_1_model_is_an_expert(tmp_path):
    np.save(tmp_path / "r.npy", np.zeros((2, 3, 1), np.uint8))
    assert convert(tmp_path / "r.npy", tmp_path / "t").num_layers == 3
    assert {tuple(row[5]) for row in rows(tmp_path / "t")} == {(0,)}


@pytest.mark.parametrize("shape", [(0, 2, 2), (0, 2, 1), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("prompt", [0, 5])
def test_b9_arrays_without_an_element(tmp_path, shape, prompt):
    options, empty = Options(prompt_tokens=prompt), np.zeros(shape, np.int32)
    np.save(tmp_path / "r.npy", empty)
    with pytest.raises(TraceError, match="no experts were routed to"):
        convert(tmp_path / "r.npy", tmp_path / "t", options=options)
    np.savez(tmp_path / "r.npz", a=empty, b=routed(2) | 1)
    convert(tmp_path / "r.npz", tmp_path / "t", options=options)
    assert {row[4] for row in rows(tmp_path / "t")} == {1}


def test_b9_empty_files_of_the_others(tmp_path):
    write_flame(tmp_path / "flame", tokens=0)
    (tmp_path / "s.json").write_text("[]")
    (tmp_path / "j.jsonl").write_text('{"layer_idx": 0, "token_idx": 0, "selected_ids": []}')
    torch.save({"records": [{"topk_ids_of_layer": torch.zeros(2, 0, 2, dtype=torch.int32)}]},
               tmp_path / "g.pt")  # fmt: skip
    for name in ("flame", "s.json", "j.jsonl", "g.pt"):
        with pytest.raises(TraceError, match=r"no experts were routed to|a non-empty list"):
            convert(tmp_path / name, tmp_path / "t")


NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 1e300]


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_b9_weights_that_are_no_numbers(tmp_path, bad):
    file = tmp_path / "x.jsonl"
    file.write_text(lines((0, 0, [1, 2], [0.5, 0.5])) + "\n" + lines((0, 1, [1, 2], [0.5, bad])))
    with pytest.raises(
        TraceError, match=r"step 1, layer 0.*not a finite|not a finite.*step 1, lay"
    ):
        convert(file, tmp_path / "t")
    pq.write_table(
        pa.table({"indices": [[1, 2]], "scores": [np.asarray([0.5, bad], np.float64)]}),
        tmp_path / "layer_00.parquet",
    )
    with pytest.raises(TraceError, match="not a finite number"):
        convert(tmp_path / "layer_00.parquet", tmp_path / "t")


def test_b9_a_wrong_pt_gets_our_own_advice(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "model.pt")
    torch.save({"records": [{"topk_ids_of_layer": [[[1]]]}]}, tmp_path / "lists.pt")
    for name, field in (
        ("no tensor", "words"),
        ("floats", torch.zeros(1, 1, 1)),
        ("bf16", torch.zeros(1, 1, 1).bfloat16()),
        ("flat", torch.tensor([1])),
    ):
        torch.save({"records": [{"topk_ids_of_layer": field}]}, tmp_path / f"{name}.pt")
    ids = torch.ones(1, 1, 1, dtype=torch.int32)
    for name, field in (("map", {"a": 1}), ("map of floats", torch.zeros(1, 2))):
        torch.save(
            {"records": [{"topk_ids_of_layer": ids}], "last_physical_to_logical_map": field},
            tmp_path / f"{name}.pt",
        )
    for name, says in (
        ("model", "contains objects other than tensors"), ("no tensor", "not an array of whole"),
        ("floats", "not an array of whole"), ("bf16", "not an array of whole"),
        ("flat", "has the shape .1."), ("map", "last_physical.*not an array of whole"),
        ("map of floats", "last_physical.*not an array of whole"),
    ):  # fmt: skip
        with pytest.raises(TraceError, match=says) as caught:
            convert(tmp_path / f"{name}.pt", tmp_path / "t")
        assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)
        assert "format sglang is" in caught.value.fix
    convert(tmp_path / "lists.pt", tmp_path / "t")


def test_b9_a_folder_of_several_formats_names_the_choice(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps([{"0": [[1, 2]]}]))
    convert(tmp_path, tmp_path / "t")
    assert detect(tmp_path).name == "selection"  # a trace in the folder is ignored
    np.save(tmp_path / "a.npy", routed(2))
    with pytest.raises(
        TraceError, match=r"several formats: a\.npy \(vllm\), b\.json \(sel"
    ) as caught:
        convert(tmp_path, tmp_path / "u")
    assert "--from" in caught.value.fix
    convert(tmp_path, tmp_path / "u", "selection")
    (tmp_path / "b.json").unlink()
    with pytest.raises(TraceError, match=r"unknown trace format.*name one of its files"):
        detect(tmp_path)


def test_b9_columns_of_flame_that_are_not_what_they_must_be(tmp_path):
    file = tmp_path / "layer_00.parquet"
    for column, says in (
        ([[1, 2, 3], [4]], "rows of different lengths"), ([["a"], ["b"]], "indices are string"),
        ([[1.0], [2.0]], "indices are double"),
    ):  # fmt: skip
        pq.write_table(pa.table({"indices": column}), file)
        with pytest.raises(TraceError, match=says):
            convert(file, tmp_path / "t")


@pytest.mark.parametrize("given", [{"step_tokens": 0}, {"step_tokens": "2"}, {"prompt_tokens": -1}])
def test_b9_options(given):
    with pytest.raises(ConfigError, match="whole number of at least"):
        Options(**given)


def test_b9_json_without_end(tmp_path):
    (tmp_path / "s.json").write_text("[" * 10**5)
    (tmp_path / "j.jsonl").write_text('{"a":' * 10**5)
    for name in ("s.json", "j.jsonl"):
        with pytest.raises(TraceError, match=r"not (valid JSON|a JSON object)"):
            convert(tmp_path / name, tmp_path / "t")


# --- SGLang ------------------------------------------------------------------------------------


def record(ids, mode, index):
    """Make a record as ``_DetailSinglePassGatherer`` and ``_DetailAccumulator`` do."""
    tokens = ids.shape[1]
    return {
        "forward_pass_id": index, "rank": 0, "gatherer_key": "primary",
        "input_ids": list(range(tokens)), "positions": list(range(tokens)),
        "extend_seq_lens": [tokens] if mode == 1 else None, "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(ids), "misc_objects": [],
    }  # fmt: skip


def sglang(tokens, seed):
    """Make a record with a dense layer 0, using two of the eight columns that SGLang reserves."""
    ids = np.full((3, tokens, 8), -1, np.int32)
    ids[1:, :, :2] = np.random.default_rng(seed).permuted(
        np.tile(np.arange(6, dtype=np.int32), (2, tokens, 1)), axis=2
    )[:, :, :2]
    return ids


@pytest.mark.parametrize("redundant", [False, True])
def test_sglang(tmp_path, redundant):
    file = tmp_path / "expert_distribution_recorder_1.0_0.pt"
    mapping = torch.arange(6).repeat(3, 1)
    if redundant:  # physical experts 4 and 5 are copies of 0 and 1
        mapping = torch.tensor([[0, 1, 2, 3, 0, 1]]).repeat(3, 1)
    passes = [sglang(5, 1), sglang(0, 2), sglang(2, 3)]
    torch.save(
        {"records": [record(ids, mode, i) for i, (ids, mode) in
                     enumerate(zip(passes, (1, 2, 2), strict=True))],
         "last_physical_to_logical_map": mapping}, file,
    )  # fmt: skip
    assert detect(file).name == "sglang"
    meta = convert(file, tmp_path / "t")
    assert (meta.num_layers, meta.top_k, meta.experts_per_layer) == (2, 2, 4 if redundant else 6)
    found = rows(tmp_path / "t")
    assert [row[:5] for row in found] == [
        *((0, layer, token, 0, -1) for layer in (0, 1) for token in range(5)),
        *((1, layer, token, 1, -1) for layer in (0, 1) for token in range(2)),
    ]
    physical = np.concatenate([passes[0][1], passes[0][2], passes[2][1], passes[2][2]])[:, :2]
    assert [row[5] for row in found] == mapping[0].numpy()[physical].tolist()


def test_sglang_errors(tmp_path):
    file = tmp_path / "r.pt"
    torch.save({"logical_count": torch.zeros(1, 3, 6), "rank": 0}, file)
    with pytest.raises(TraceError, match=r"no per-token records.*logical_count, rank.*per_token"):
        convert(file, tmp_path / "t")
    torch.save({"records": [{"global_physical_count": torch.zeros(3, 6)}]}, file)
    with pytest.raises(TraceError, match="counts of experts instead of the routing of each token"):
        convert(file, tmp_path / "t")
    wrong = record(sglang(3, 0), 1, 0)
    torch.save({"records": [wrong], "last_physical_to_logical_map": torch.zeros(3, 2).int()}, file)
    with pytest.raises(TraceError, match="is not in last_physical_to_logical_map"):
        convert(file, tmp_path / "t")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="cannot be read"):
        convert(file, tmp_path / "t", "sglang")


def test_a_file_that_wants_to_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("it ran",))

    torch.save({"records": [Evil()]}, tmp_path / "r.pt")
    with pytest.raises(TraceError, match="contains objects"):
        convert(tmp_path / "r.pt", tmp_path / "t")
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(TraceError, match="unknown trace format"):
        detect(tmp_path / "plain.pt")


# --- JSON lines --------------------------------------------------------------------------------


def lines(*records):
    keys = ("layer_idx", "token_idx", "selected_ids", "gate_weights")
    return "\n".join(json.dumps(dict(zip(keys, r, strict=False)) | {"more": 1}) for r in records)


def test_jsonl(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(lines((1, 0, [4, 2], [0.75, 0.25]), (3, 0, [0, 1], [0.5, 0.5]),
                          (1, 1, [3, 2], [0.75, 0.25]), (3, 1, [2, 1], [0.5, 0.5]),
                          (1, 0, [1, 2], [0.75, 0.25]), (3, 0, [0, 4], [0.5, 0.5])))  # fmt: skip
    assert detect(file).name == "jsonl"
    meta = convert(file, tmp_path / "t")
    assert (meta.num_layers, meta.experts_per_layer, meta.top_k) == (2, 5, 2)
    assert rows(tmp_path / "t") == [
        (0, 0, 0, 1, 0, [4, 2], [0.75, 0.25]), (0, 1, 0, 1, 0, [0, 1], [0.5, 0.5]),
        (1, 0, 0, 1, 0, [3, 2], [0.75, 0.25]), (1, 1, 0, 1, 0, [2, 1], [0.5, 0.5]),
        (2, 0, 0, 1, 1, [1, 2], [0.75, 0.25]), (2, 1, 0, 1, 1, [0, 4], [0.5, 0.5]),
    ]  # fmt: skip


def test_jsonl_of_one_layer_and_of_one_token(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(lines(*((0, token, [token]) for token in range(3))))
    convert(file, tmp_path / "t")
    assert [row[:2] for row in rows(tmp_path / "t")] == [(0, 0), (1, 0), (2, 0)]
    file.write_text(lines(*((layer, 0, [1]) for _ in range(2) for layer in range(3))))
    convert(file, tmp_path / "t", replace=True)
    assert [(row[0], row[1], row[4]) for row in rows(tmp_path / "t")] == [
        *((0, layer, 0) for layer in range(3)), *((1, layer, 1) for layer in range(3)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"layer_idx": 0, "selected_ids": [1]}', "line 1.*token_idx is missing|token_idx is miss"),
        ('{"layer_idx": 0', "not a JSON object"),
        (lines((0, 0, [1])) + "\n[]", "line 2"),
        (lines((0, 0, "ab")), "must be whole numbers from 0"),
        (lines((0, -1, [1])), "must be whole numbers from 0"),
        (lines((0, 0, [1, 2], [0.5])), "gate_weights must contain one number per selected id"),
        (lines((0, 0, [1]), (0, 1, [1]), (1, 0, [1]), (1, 1, [1])), "sorted by layer"),
        (lines((0, 0, [1]), (2, 0, [1]), (1, 0, [1])), "layer 1 after layer 2"),
    ],
)
def test_jsonl_errors(tmp_path, content, message):
    file = tmp_path / "t.jsonl"
    file.write_text(content)
    with pytest.raises(TraceError, match=message) as caught:
        convert(file, tmp_path / "t")
    assert "format jsonl is JSON lines" in caught.value.fix


# --- all of them -------------------------------------------------------------------------------


def test_tokens_with_fewer_experts_than_others(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(lines((0, 0, [3, 1, 2]), (0, 1, [4]), (0, 2, [])).replace("[]", "[-1]"))
    convert(file, tmp_path / "t")
    assert [row[5] for row in rows(tmp_path / "t")] == [[3, 1, 2], [4], []]


def test_what_the_user_says_wins_and_is_checked(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(lines((0, 0, [3, 1])))
    assert convert(file, tmp_path / "t", experts=9).experts_per_layer == 9
    with pytest.raises(ConfigError, match="3 experts, but the file has expert 3"):
        convert(file, tmp_path / "t", experts=3)
    with pytest.raises(ConfigError, match=r"unknown format 'csv'.*flame"):
        convert(file, tmp_path / "t", "csv")
    with pytest.raises(TraceError, match="not a valid Parquet file"):
        convert(file, tmp_path / "t", "flame")


def test_what_is_none_of_them(tmp_path):
    with pytest.raises(TraceError, match="no such file"):
        detect(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(TraceError, match="unknown trace format") as caught:
        detect(tmp_path / "text")
    assert all(f"{name}: " in caught.value.fix for name in FORMATS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match="unknown trace format"):
        detect(tmp_path / "empty")


def test_a_trace_is_not_converted(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(lines((0, 0, [3, 1])))
    convert(file, tmp_path / "t")
    assert TraceReader(tmp_path / "t").meta.source == "jsonl"
    with pytest.raises(TraceError, match="the file is already a trace"):
        convert(tmp_path / "t", tmp_path / "u")
