"""The command line as a process: its output and its exit status."""

import json
import re
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fluxmoe
from fluxmoe import plugins
from fluxmoe.errors import PolicyFaultError
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from tests.commandline import command, fails, here, succeeds, synth
from tests.core.reference import replay
from tests.plugins.rig import MRU, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "mru.py"
    return Path(write(path))


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    printed = succeeds(
        *synth(layers=4, experts=16, top_k=4, steps=50, batch=2), "--seed", 7, "--out", path
    )
    assert "200 events" in printed
    return path


@pytest.mark.parametrize(
    ("prefetch", "banks"),
    [
        ("none", 1),
        ("next-layer:depth=2", 2),
        *(
            pytest.param(prefetch, banks, marks=pytest.mark.full)
            for prefetch, banks in [
                ("none", 2),
                ("next-layer", 1),
                ("next-layer", 2),
                ("next-layer:depth=2", 1),
            ]
        ),
    ],
)
def test_simulate_equals_the_reference(trace, plugin, prefetch, banks):
    policies, capacities = ["lru", "lfu", "belady", "immediate", "mru"], ["16", "40%", "200MiB"]
    printed = succeeds("simulate", trace, "--policy", ",".join(policies), "--capacity",
                       ",".join(capacities), "--prefetch", prefetch, "--banks", banks,
                       "--plugin", plugin, "--json", run=command)  # fmt: skip
    results = json.loads(printed)
    events = Events.load(trace)
    rows = [(layer, events.ids[at].tolist()) for _, layer, _, at in events]
    pages = [16, 25, 200 * 2**20 // events.meta.page_bytes]
    assert [(r["policy"], r["capacity_pages"]) for r in results] == [
        (policy, capacity) for policy in policies for capacity in pages
    ]
    for result in results:
        expected = replay(rows, 4, 16, result["policy"], result["capacity_pages"], prefetch, banks)
        assert {name: result[name] for name in expected} == expected
        assert result["prefetch"] == prefetch
        assert result["bytes_demand"] == expected["misses"] * events.meta.page_bytes
        assert result["policy_faults"] == 0


def test_the_table_names_oracles_and_faults(trace, tmp_path):
    broken = tmp_path / "broken.py"
    write(broken, MRU.replace("-view.last_use[pages]", "view.no_such_thing"))
    printed = succeeds("simulate", trace, "--policy", "lru,belady,mru", "--capacity", "25%",
                       "--plugin", broken, "--contain")  # fmt: skip
    assert "4 layers x 16 experts = 64 pages, 200 events" in printed
    assert "belady is an oracle" in printed and "lru is an oracle" not in printed
    assert "mru at 16 pages: 16 calls to a policy failed" in printed


def test_everything_at_once(trace, plugin, tmp_path):
    """Several policies, capacities, prefetch policies and processes; a profile and a report."""
    out = tmp_path / "out.html"
    done = command(
        *("simulate", trace, "--policy", "lru,mru", "--capacity", "25%,50%"),
        *("--prefetch", "none,next-layer", "--plugin", plugin, "--jobs", "2"),
        *("--hardware", "rtx4090-pcie4", "--report", out, "--json"),
    )
    assert done.returncode == 0 and done.stderr.startswith("note: 16 slots")
    assert done.stderr.count("\n") == 1
    results = json.loads(done.stdout)
    assert [(r["policy"], r["capacity_pages"], r["prefetch"]) for r in results] == [
        (policy, pages, prefetch)
        for policy in ("lru", "mru")
        for pages in (16, 32)
        for prefetch in ("none", "next-layer")
    ]
    assert all(r["tokens_per_s"] > 0 and 0 < r["stall_share"] < 1 for r in results)
    assert "belady" in out.read_text()  # the optimum is only in the report
    printed = succeeds("simulate", trace, "--policy", "lru", "--capacity", "25%",
                       "--hardware", "rtx4090-pcie4")  # fmt: skip
    assert "tokens/s" in printed


def test_wrong_hardware_and_report(trace, tmp_path):
    run = "simulate", trace, "--policy", "lru", "--capacity", "25%"
    fails(*run, "--hardware", "abacus", code="FM101", message="unknown hardware profile 'abacus'")
    fails(*run, "--report", tmp_path / "no" / "r", code="FM101", message="no such folder")
    fails(*run, "--report", tmp_path, code="FM101", message="the file already exists.*--force")


def test_policies(plugin):
    listed = json.loads(succeeds("policies", "--json", "--plugin", plugin))
    names = {(policy["kind"], policy["name"]) for policy in listed}
    assert names >= {
        *(("eviction", name) for name in ("immediate", "lru", "lfu", "belady", "mru")),
        ("prefetch", "none"), ("prefetch", "next-layer"), ("arbitration", "fixed"),
    }  # fmt: skip
    [mru] = [policy for policy in listed if policy["name"] == "mru"]
    assert mru == {"kind": "eviction", "name": "mru", "plugin": str(plugin), "origin": "named",
                   "version": "", "status": "ok", "problem": "", "oracle": False,
                   "summary": "Evict the page that was used last.", "faults": None}  # fmt: skip
    assert [policy["name"] for policy in listed if policy["oracle"]] == ["belady"]
    assert "belady (oracle)" in succeeds("policies")


# --- errors ------------------------------------------------------------------------------------


def test_unknown_policies_list_the_known(trace):
    fails("simulate", trace, "--policy", "lru,lrru", "--capacity", 16, code="FM201",
          message="unknown eviction policy 'lrru'.*belady.*lfu, lru")  # fmt: skip
    fails("simulate", trace, "--policy", "lru", "--capacity", 16, "--prefetch", "psychic",
          code="FM201", message="unknown prefetch policy 'psychic'.*next-layer, none")  # fmt: skip


def test_options_of_policies(trace):
    run = ["simulate", trace, "--policy", "lru", "--capacity", 16, "--prefetch"]
    fails(*run, "next-layer:depth=0", code="FM101", message="depth")
    fails(*run, "next-layer:deep=1", code="FM101", message="deep")
    fails(*run, "next-layer:depth", code="FM101", message="not an option: 'depth'")


def test_a_plugin_that_cannot_be_imported(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import no_such_package")
    fails("policies", "--plugin", bad, code="FM202", message="No module named 'no_such_package'")
    fails("policies", "--plugin", tmp_path / "none.py", code="FM202", message="no such file")


def test_capacities(trace):
    run = ["simulate", trace, "--policy", "lru", "--capacity"]
    fails(*run, "50%,3", code="FM502", message="3 slots .*4 experts .*; capacity 3")
    succeeds(*run, "4")  # in waves
    fails(*run, "lots", code="FM101", message="not a valid capacity: 'lots'")
    fails(*run, ",", code="FM101", message="no values given")


def test_traces(tmp_path):
    run = ["simulate", "--policy", "lru", "--capacity", 16]
    fails(*run, tmp_path / "none", code="FM501", message="no such file", run=command)
    (tmp_path / "text").write_text("not Parquet")
    fails(*run, tmp_path / "text", code="FM501", message="not a Parquet file")


TYPO = MRU.replace("-view.last_use[pages]", "view.last_uses[pages]")


@pytest.mark.parametrize("jobs", [1, 2])
def test_c2_a_policy_that_fails_ends_a_simulation_and_its_line_is_named(trace, tmp_path, jobs):
    broken = Path(write(tmp_path / "broken.py", TYPO))
    at = 1 + broken.read_text().splitlines().index("        return view.last_uses[pages]")
    run = ["simulate", trace, "--policy", "mru,lru", "--capacity", "25%", "--plugin", broken]
    said = fails(*run, "--jobs", jobs, code="FM203", run=command if jobs > 1 else here,
                 message="'mru': score raised AttributeError")  # fmt: skip
    assert f"; {broken}:{at}; did you mean 'last_use'?; " in said
    contained = json.loads(succeeds(*run, "--contain", "--json"))
    assert [result["policy_faults"] > 0 for result in contained] == [True, False]


def test_c2_simulate_of_python_is_strict_by_default(trace, tmp_path):
    registry = plugins.load([write(tmp_path / "broken.py", TYPO)])
    with pytest.raises(PolicyFaultError, match="did you mean 'last_use'"):
        simulate(trace, "mru", "25%", registry=registry)
    assert simulate(trace, "mru", "25%", registry=registry, strict=False).policy_faults == 16


def test_c15_slots_below_a_step_s_pages_are_remarked_on(trace):
    run = ["simulate", trace, "--policy", "lru", "--capacity"]
    cycle = Events.load(trace).cycle
    assert 16 < cycle < 32  # two tokens of 4 layers × 4 experts
    below, enough = here(*run, "16,17,100%", "--json"), here(*run, f"{cycle}")
    assert below.stderr == (
        f"note: 16, 17 slots are fewer than the {cycle} pages of a step: lru evicts pages before "
        "their next use\n"
    )
    assert json.loads(below.stdout)[0]["hit_rate"] < 0.1
    assert enough.stderr == ""


@pytest.mark.parametrize(
    ("once", "repeated"),
    [
        (["--policy", "lru,lfu", "--capacity", "50%,25%", "--prefetch", "none,next-layer"],
         ["--policy", "lru", "--policy", "lfu", "--capacity", "50%", "--capacity", "25%",
          "--prefetch", "none", "--prefetch", "next-layer"]),
        (["--policy", " lru , lfu,", "--capacity", "50%,25%", "--prefetch", "none,next-layer"],
         ["--policy", "lru,lfu", "--capacity", "50%,25%", "--prefetch", "none",
          "--prefetch", "next-layer"]),
    ],
)  # fmt: skip
def test_b2_list_options_take_commas_and_repetition(trace, once, repeated):
    one, other = (succeeds("simulate", trace, *words, "--json") for words in (once, repeated))
    assert one == other
    assert [(r["policy"], r["prefetch"]) for r in json.loads(one)][:3] == [
        ("lru", "none"), ("lru", "next-layer"), ("lru", "none")
    ]  # fmt: skip


def test_b2_plugins_and_policies_to_check_are_lists_too(plugin, tmp_path):
    other = write(tmp_path / "other.py", name="other")
    for words in (["--plugin", f"{plugin},{other}"], ["--plugin", plugin, "--plugin", other]):
        names = {row["name"] for row in json.loads(succeeds("policies", "--json", *words))}
        assert names >= {"mru", "other"}
    both = write(tmp_path / "both.py", MRU + '    register("second", MostRecentlyUsed)\n')
    checked = json.loads(succeeds("plugin", "check", both, "--policy", "mru,second", "--json"))
    assert [verdict["name"] for verdict in checked] == ["mru", "second"]
    fails("policies", "--plugin", " , ", code="FM101", message="no values given; --plugin")


def test_a_trace_s_name_may_have_a_colon(trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["--policy", "lru", "--capacity", "25%"]
    fails("simulate", "a:b.parquet", *run, code="FM501", message="no such file; a:b.parquet")
    Path("a:b.parquet").write_bytes(trace.read_bytes())
    succeeds("simulate", "a:b.parquet", *run)
    fails("trace", "convert", "a:b.parquet", "--out", "c", code="FM501", message="already a trace")


def test_names_of_files_need_not_be_utf8(trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a\udcff.parquet"
    Path(name).write_bytes(trace.read_bytes())
    run = ["--policy", "lru", "--capacity", "25%"]
    assert "lru" in succeeds("simulate", name, *run, "--report", "r\udcff.html")
    assert "a\\udcff" in Path("r\udcff.html").read_text()
    for kind in ("svg", "png"):
        succeeds("trace", "info", name, "--picture", f"p\udcff.{kind}")
    fails("trace", "convert", name, "--out", "c", code="FM501", message="already a trace")
    fails("trace", "info", "b\udcff", code="FM501", message="no such file")
    tokens = pa.table({"indices": pa.array([[1, 2], [3, 4]], pa.list_(pa.int16()))})
    with open("f\udcff.parquet", "wb") as file:
        pq.write_table(tokens, file)
    said = succeeds("trace", "convert", "f\udcff.parquet", "--out", "c\udcff.parquet")
    assert "2 rows" in said


def test_synth_arguments(tmp_path):
    run = [*synth(layers=2, experts=4, top_k=5, steps=1, batch=1), "--out"]
    fails(*run, tmp_path / "t", code="FM101", message="5 exceeds the 4 experts")
    run = [*synth(layers=2, experts=4, top_k=2, steps=1, batch=1), "--out"]
    fails(*run, tmp_path / "no" / "t", code="FM501", message="cannot write")
    assert list(tmp_path.iterdir()) == []


NOISY = (
    """
import os, sys
print("printed by Python")
os.write(1, b"written by a library in C\\n")
os.system("echo said by a child process")
"""
    + MRU
)


@pytest.mark.parametrize("format", ["--json", "--csv"])
@pytest.mark.parametrize("run", [here, command])
def test_c11_what_a_plugin_prints_does_not_spoil_data(tmp_path, run, format):
    noisy = write(tmp_path / "noisy.py", NOISY if run is command else 'print("printed")' + MRU)
    quiet = write(tmp_path / "quiet.py")
    done = run("policies", "--plugin", noisy, format)
    assert done.returncode == 0
    assert done.stdout == succeeds("policies", "--plugin", quiet, format).replace(quiet, noisy)
    for words in ("printed by Python", "in C", "child process") if run is command else ("printed",):
        assert words in done.stderr
    text = run("policies", "--plugin", noisy)
    assert "printed" in text.stdout and text.stderr == ""


def test_c11_workers_that_print_do_not_spoil_data(trace, tmp_path):
    noisy = write(tmp_path / "noisy.py", NOISY)
    run = ["simulate", trace, "--policy", "mru,lru", "--capacity", "50%", "--plugin", noisy]
    done = command(*run, "--jobs", 2, "--json")
    assert [result["policy"] for result in json.loads(done.stdout)] == ["mru", "lru"]
    assert done.stderr.count("said by a child process") == 3


@pytest.mark.parametrize("arguments", [["simulate"], ["no-such-verb"], ["policies", "--no-such"]])
def test_usage_errors(arguments):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: fluxmoe" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path):
    run = ["simulate", tmp_path / "none", "--policy", "lru", "--capacity", "1"]
    for arguments in (["--debug", *run], [*run, "--debug"]):
        done = command(*arguments)
        assert done.returncode != 0
        assert "Traceback" in done.stderr and "TraceError" in done.stderr


def test_ctrl_c():
    program = (
        "from fluxmoe.cli import main\n"
        "import fluxmoe.plugins\n"
        "def load(extra): raise KeyboardInterrupt\n"
        "fluxmoe.plugins.load = load\n"
        "main()"
    )
    done = command("policies", program=program)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_a_reader_that_goes_away():
    program = (
        "import os, sys\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "os.dup2(writer, 1)\n"
        "from fluxmoe.cli import main\n"
        "main()"
    )
    done = command("policies", "--json", program=program)
    assert done.returncode != 0 and done.stderr == ""


# --- starting ----------------------------------------------------------------------------------


def test_version_and_help():
    assert succeeds("--version", run=command) == f"fluxmoe {fluxmoe.__version__}\n"
    printed = succeeds("--help")
    assert all(verb in printed for verb in ("simulate", "trace", "policies", "--debug"))


def test_c13_help_says_what_values_are_called_in_plain_words():
    from tests.docs.commands import verbs

    for verb, _ in verbs():
        texts = [succeeds(*verb.split(), flag) for flag in ("-h", "--help")]
        assert texts[0] == texts[1]
        assert not re.search(r"<\w|[{}╭…]|list\[|\.\.\.$", texts[0]), texts[0]
        assert texts[0].startswith(f"Usage: fluxmoe {verb} [OPTIONS]")
    assert "[OPTIONS] TRACE\n" in succeeds("simulate", "-h")
    assert "[OPTIONS] [URL]\n" in succeeds("top", "-h")
    assert "--backend torch|vllm " in succeeds("generate", "-h")
    assert "without loading the model." in " ".join(succeeds("-h").split())
    assert "Missing argument 'TRACE'" in here("simulate").stderr


def test_c13_python_m():
    program = "import runpy, sys; runpy.run_module('fluxmoe', run_name='__main__')"
    assert succeeds("--version", run=partial(command, program=program)).startswith("fluxmoe ")


def test_c13_completion(monkeypatch):
    # Otherwise, typer looks for a shell among the parent processes, and a CI job has none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "_FLUXMOE_COMPLETE" in succeeds("--show-completion", "bash")
    monkeypatch.setenv("_FLUXMOE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fluxmoe simulate --cap")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert succeeds(run=command) == "--capacity\n"


def test_help_imports_no_array_file_library_and_no_engine():
    program = (
        "import sys, atexit\n"
        "import fluxmoe\n"
        "before = set(sys.modules)\n"
        "from fluxmoe.cli import main\n"
        "heavy = {'pyarrow', 'torch', 'vllm', 'numba', 'pandas', 'fluxmoe.plugins'}\n"
        "atexit.register(lambda: print(heavy & (set(sys.modules) - before), file=sys.stderr))\n"
        "main()"
    )
    assert command("--help", program=program).stderr == "set()\n"


def test_e11_closed_output_and_names_that_look_like_markup(tmp_path):
    closed = "import sys; sys.stdout = None; from fluxmoe.cli import main; main()"
    done = command("policies", program=closed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    plugin = tmp_path / "red.py"
    plugin.write_text(
        "import fluxmoe\n"
        "class Red(fluxmoe.EvictionPolicy):\n"
        "    '[/red] [bold'\n"
        "    def score(self, view, pages): return view.last_use[pages]\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register): register('[/red]', Red)\n"
    )
    for words in (("policies", "--plugin"), ("plugin", "check")):
        assert "[/red]" in succeeds(*words, plugin)


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "MODEL", "--memory", "1GiB"),
        ("generate", "MODEL", "--prompt-ids", "1"),
        ("trace", "record", "MODEL", "--prompt-ids", "1", "--out", "FOLDER/t"),
        ("codec", "MODEL"),
        ("doctor", "--measure", "FOLDER/m.yaml", "--model", "MODEL"),
        ("config", "check", "FOLDER/c.yaml"),
        ("serve", "FOLDER/c.yaml"),
    ],
    ids=lambda words: words[0],
)
def test_b6_one_code_for_a_model_that_is_missing(words, tmp_path):
    missing = tmp_path / "no" / "model"
    (tmp_path / "c.yaml").write_text("model: ./no/model\nmemory: {budget: 1MiB}\n")
    given = [word.replace("MODEL", str(missing)).replace("FOLDER", str(tmp_path)) for word in words]
    done = here(*given)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if str(missing) in line]
    assert line.startswith("error[FM406]: no such folder")
