"""The command line as a user meets it: a process, its output and its exit code."""

import json
from pathlib import Path

import pytest

import fluxmoe
from fluxmoe.sim.events import Events
from tests.commandline import command, fails, succeeds, synth
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
                       "--plugin", plugin, "--strict-policies", "--json", run=command)  # fmt: skip
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
                       "--plugin", broken)  # fmt: skip
    assert "4 layers x 16 experts = 64 pages, 200 events" in printed
    assert "belady is an oracle" in printed and "lru is an oracle" not in printed
    assert "mru at 16 pages: 16 faults" in printed


def test_everything_at_once(trace, plugin, tmp_path):
    """Policies × capacities × prefetchers in two processes, timed, with a report, as pure JSON."""
    out = tmp_path / "out.html"
    done = command(
        *("simulate", trace, "--policy", "lru,mru", "--capacity", "25%,50%"),
        *("--prefetch", "none,next-layer", "--plugin", plugin, "--jobs", "2"),
        *("--hardware", "rtx4090-pcie4", "--report", out, "--json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)
    assert [(r["policy"], r["capacity_pages"], r["prefetch"]) for r in results] == [
        (policy, pages, prefetch)
        for policy in ("lru", "mru")
        for pages in (16, 32)
        for prefetch in ("none", "next-layer")
    ]
    assert all(r["tokens_per_s"] > 0 and 0 < r["stall_share"] < 1 for r in results)
    assert "belady" in out.read_text()  # the optimum was added to the report, and to it alone
    printed = succeeds("simulate", trace, "--policy", "lru", "--capacity", "25%",
                       "--hardware", "rtx4090-pcie4")  # fmt: skip
    assert "tokens/s" in printed


def test_wrong_hardware_and_report(trace, tmp_path):
    run = "simulate", trace, "--policy", "lru", "--capacity", "25%"
    fails(*run, "--hardware", "abacus", code="FM101", message="unknown hardware profile 'abacus'")
    fails(*run, "--report", tmp_path, code="FM101", message="cannot write the file")


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
    largest = Events.load(trace).largest
    fails(*run, "50%,3", code="FM502", message=f"3 slots .*{largest} experts; capacity 3")
    fails(*run, "lots", code="FM101", message="not a valid capacity: 'lots'")
    fails(*run, ",", code="FM101", message="no values given")


def test_traces(tmp_path):
    run = ["simulate", "--policy", "lru", "--capacity", 16]
    fails(*run, tmp_path / "none", code="FM501", message="no such file", run=command)
    (tmp_path / "text").write_text("not Parquet")
    fails(*run, tmp_path / "text", code="FM501", message="not a Parquet file")


def test_a_policy_fault_is_an_error_where_asked(trace, tmp_path):
    broken = tmp_path / "broken.py"
    write(broken, MRU.replace("-view.last_use[pages]", "view.no_such_thing"))
    run = ["simulate", trace, "--policy", "mru", "--capacity", 16, "--plugin", broken]
    fails(*run, "--strict-policies", code="FM203", message="'mru': score raised AttributeError")


def test_synth_arguments(tmp_path):
    run = [*synth(layers=2, experts=4, top_k=5, steps=1, batch=1), "--out"]
    fails(*run, tmp_path / "t", code="FM101", message="5 exceeds the 4 experts")
    run = [*synth(layers=2, experts=4, top_k=2, steps=1, batch=1), "--out"]
    fails(*run, tmp_path / "no" / "t", code="FM501", message="cannot write")
    assert list(tmp_path.iterdir()) == []


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
        "from fluxmoe.cli import main, policies, output\n"
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
