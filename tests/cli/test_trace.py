"""``fluxmoe trace``: its verbs, run from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fluxmoe.testing import checkpoints
from fluxmoe.trace import TraceReader
from fluxmoe.trace.statistics import Statistics
from tests.commandline import command, fails, succeeds, synth
from tests.recorded import table


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("model") / "tiny", "qwen3-moe")


# --- record ------------------------------------------------------------------------------------


def test_record(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [5, 6, 7]}\n\n{"prompt": "Abc"}\n')
    run = ["trace", "record", model, "--out", out, "--prompts", prompts, "--prompt", "Hello",
           "--prompt-ids", "9", "--batch", 3, "--max-new-tokens", 4]  # fmt: skip
    printed = json.loads(succeeds(*run, "--json", "--weights", "--predict"))
    assert printed["requests"] == 4
    assert printed["columns"] == ["weights", "predicted"]
    assert printed["rows"] == TraceReader(out).num_rows == len(table(out))
    rows = [row for row in table(out) if row["layer"] == 0]
    # Texts come first, then numbers, then the file. The first batch has prompts of 5, 1 and 3
    # tokens, padded to 5; the second has one prompt of 3 tokens.
    assert [sum(r["step"] == s for r in rows) for s in range(8)] == [15, 3, 3, 3, 3, 1, 1, 1]
    assert [r["request"] for r in rows if r["step"] in (1, 4, 5)] == [0, 1, 2, 3, 3, 3, 3]
    assert TraceReader(out).meta.source == "torch"
    before = out.read_bytes()
    fails(*run, code="FM101", message="the file already exists; .*--force")
    assert out.read_bytes() == before
    assert "top 4" in succeeds(*run, "--force", "--max-steps", 2, "--steps", "decode")
    assert {(r["step"], r["phase"]) for r in table(out)} == {(0, 1), (1, 1)}


def test_sampling_is_reproducible(model: Path, tmp_path: Path) -> None:
    def record(name: str, *more: object) -> list[dict]:
        out = tmp_path / name
        succeeds("trace", "record", model, "--out", out, "--prompt", "x", "--max-new-tokens", 8,
                 *more)  # fmt: skip
        return [row["experts"] for row in table(out)]

    one = record("a", "--seed", 3)
    assert record("b", "--seed", 3, "--memory", "1MiB", "--eviction", "lfu") == one
    assert record("c", "--seed", 4) != one
    assert record("d", "--temperature", 0) == record("e", "--temperature", 0, "--seed", 9)


def test_record_errors(model: Path, tmp_path: Path) -> None:
    run = ["trace", "record", model, "--out", tmp_path / "t"]
    fails(*run, code="FM101", message="no prompt given")
    fails(*run, "--prompt", "", code="FM101", message="a prompt is empty")
    fails(*run, "--prompt-ids", "a", code="FM101", message="not a list of numbers: 'a'; --prompt")
    fails(*run, "--prompt-ids", "99999", code="FM101", message="invalid prompt tokens: .99999.")
    fails(*run, "--prompts", tmp_path / "no", code="FM101", message="cannot read the prompts")
    fails(*run, "--prompt", "x", "--predict", "--backend", "vllm", code="FM402", message=".*torch")
    fails("trace", "record", tmp_path / "no", "--out", tmp_path / "t", "--prompt-ids", "1",
          code="FM406", message="no such folder")  # fmt: skip
    fails("trace", "record", model, "--out", tmp_path / "no" / "t", "--prompt", "x", code="FM501",
          message="cannot write a trace: the folder does not exist")  # fmt: skip
    bad = tmp_path / "p.jsonl"
    for line, message in (
        ("{", "not valid JSON"), ("[]", "neither a"), ('{"prompt": 3}', "neither a"),
        ('{"prompt_ids": [1.5]}', "neither a"),
    ):  # fmt: skip
        bad.write_text('{"prompt_ids": [1]}\n' + line)
        fails(*run, "--prompts", bad, code="FM101", message=f"{message}.*line 2")
    assert not (tmp_path / "t").exists()


@pytest.mark.vllm
def test_record_with_vllm(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    printed = json.loads(
        succeeds("trace", "record", model, "--out", out, "--backend", "vllm", "--memory", "16MiB",
                 "--prompt", "Hello", "--prompt", "World and more", "--prompt-ids", "5,6,7",
                 "--batch", 2, "--max-new-tokens", 6, "--weights", "--max-steps", 9, "--json")
    )  # fmt: skip
    reader = TraceReader(out)
    assert (reader.meta.source, reader.columns) == ("vllm", ("weights",))
    rows = [row for row in table(out) if row["layer"] == 0]
    assert {row["step"] for row in rows} == set(range(9))
    assert {row["request"] for row in rows} == {0, 1, 2}
    assert max(sum(r["step"] == s and r["phase"] == 1 for r in rows) for s in range(9)) == 2
    assert printed["stats"]["hits"] > 0


# --- convert, info, synth ----------------------------------------------------------------------


def test_convert(tmp_path: Path) -> None:
    source, out = tmp_path / "s.json", tmp_path / "t.parquet"
    source.write_text(json.dumps([{"1": [[0, 1], [2, 3]]}, {"1": [[3, 0]]}]))
    run = ["trace", "convert", source, "--out", out]
    assert "3 rows, 1 layers x 8 experts, top 2" in succeeds(*run, "--experts", 8, "--model", "m")
    assert TraceReader(out).meta.model == "m"
    fails(*run, code="FM101", message="the file already exists.*--force")
    succeeds(*run, "--force", "--max-steps", 1)
    assert len(table(out)) == 2
    fails(*run, "--force", "--from", "csv", code="FM101", message="unknown format 'csv'; --from")
    fails(*run, "--force", "--from", "vllm", code="FM501", message="it is damaged.*npy")
    fails("trace", "convert", tmp_path / "no", "--out", out, "--force", code="FM501",
          message="no such file")  # fmt: skip


def test_info(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    run = ["trace", "synth", "--layers", 2, "--experts", 8, "--top-k", 2, "--steps", 30, "--batch",
           4, "--out", out]  # fmt: skip
    succeeds(*run)
    fails(*run, code="FM101", message="the file already exists.*--force")
    succeeds(*run, "--force", "--locality", "0.5:0.1", "--scan-every", 10)
    fails(*run, "--force", "--locality", "a", code="FM101", message="'a' is neither a number")
    printed = succeeds("trace", "info", out, "--picture", tmp_path / "p.svg")
    for part in (
        "2 layers x 8 experts = 16 pages of 9.0 MiB each, top 2",
        "30 steps, 60 events (6 prefill, 54 decode), 4 requests",
        "Skew and locality",
        "Working sets",
        "Union per event",
        "Reuse distance",
    ):
        assert part in printed
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    found = json.loads(succeeds("trace", "info", out, "--json"))
    assert list(found) == list(Statistics.__dataclass_fields__)
    assert (found["steps"], found["events"], found["meta"]["top_k"]) == (30, 60, 2)
    fails("trace", "info", tmp_path / "no", code="FM501", message="no such file")
    fails("trace", "info", out, "--picture", tmp_path / "p.gif", code="FM101", message=".*svg")


def test_help_of_the_verbs_loads_no_model_library() -> None:
    program = (
        "import contextlib, io, sys\n"
        "from fluxmoe.cli import main\n"
        "for verb in ('record', 'convert', 'info', 'synth'):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(['trace', verb, '--help'])\n"
        "heavy = {'torch', 'vllm', 'transformers', 'pyarrow', 'numba'}\n"
        "print(heavy & set(sys.modules))\n"
    )
    assert command(program=program).stdout == "set()\n"


@pytest.mark.parametrize(
    ("size", "nbytes"), [("1MiB", 1 << 20), ("24Gi", 24 << 30), ("8192", 8192)]
)
def test_b9_sizes_of_pages_have_units(tmp_path: Path, size: str, nbytes: int) -> None:
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"layer_idx": 0, "token_idx": 0, "selected_ids": [3, 1]}\n')
    succeeds("trace", "convert", lines, "--out", tmp_path / "c", "--page-bytes", size)
    whole = synth(layers=1, experts=2, top_k=1, steps=1, batch=1, page_bytes=size)
    succeeds(*whole, "--out", tmp_path / "s")
    for name in "cs":
        assert TraceReader(tmp_path / name).meta.page_bytes == nbytes
    for bad in ("0", "50%", "lots"):
        tiny = synth(layers=1, experts=2, top_k=1, steps=1, batch=1)
        for words in (("trace", "convert", lines), tuple(tiny)):
            fails(*words, "--out", tmp_path / "n", "--page-bytes", bad, code="FM101",
                  message=".*; --page-bytes")  # fmt: skip
