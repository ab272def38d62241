"""Golden traces, the leak check and the fixtures of the kit."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import _fluxmoe_pytest
import fluxmoe.testing
from fluxmoe.core.types import Phase
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.testing import GOLDEN, LeakError, events_of, no_leaks
from fluxmoe.trace import synth
from tests.core import reference

ROOT = Path(__file__).parents[2]


# --- golden traces --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_the_figures_of_golden_traces_are_right(name):
    trace = GOLDEN[name]
    assert trace.name == name
    assert trace.capacities == (
        trace.events.largest,
        trace.events.meta.geometry.num_pages // 2,
        trace.events.meta.geometry.num_pages,
    )
    for policy, misses in trace.misses.items():
        found = tuple(simulate(trace.events, policy, c).misses for c in trace.capacities)
        assert found == misses, policy


@pytest.mark.parametrize("name", GOLDEN)
def test_lru_of_golden_traces_agrees_with_plain_python(name):
    trace = GOLDEN[name]
    geometry = trace.events.meta.geometry
    for capacity, misses in zip(trace.capacities, trace.misses["lru"], strict=True):
        layers, experts = geometry.num_layers, geometry.experts_per_layer
        plain = reference.Reference(layers, experts, [capacity], [0] * layers, reference.lru)
        for _, layer, _, where in trace.events:
            plain.event(layer, trace.events.ids[where].tolist())
        assert plain.counts["misses"] == misses


def test_a_trace_in_memory_is_the_one_that_a_file_would_hold(tmp_path):
    workload = GOLDEN["mixed"].workload
    synth.write(workload, tmp_path / "mixed.parquet")
    written, made = Events.load(tmp_path / "mixed.parquet"), events_of(workload)
    for name, column in written.block._asdict().items():
        other = getattr(made.block, name)
        assert (column is None and other is None) or np.array_equal(column, other), name
    assert {phase for _, _, phase, _ in made} == {Phase.PREFILL, Phase.DECODE}


def test_predictions_are_right_ahead_and_empty_in_the_last_layer():
    events = GOLDEN["predicted"].events
    offsets, guesses = events.predicted
    ids = [events.ids[where].tolist() for *_, where in events]
    for at, (_, layer, _, _) in enumerate(events):
        told = guesses[offsets[at] : offsets[at + 1]].tolist()
        assert told == (ids[at + 1] if layer < 3 else [])


# --- leaks ----------------------------------------------------------------------------------------


def test_what_is_put_back_is_no_leak():
    with no_leaks():
        thread = threading.Thread(target=time.sleep, args=(0.01,))
        thread.start()
        with tempfile.TemporaryFile():
            pass
        thread.join()


def test_an_open_file_is_a_leak():
    with pytest.raises(LeakError, match="open file"), no_leaks():
        kept = tempfile.NamedTemporaryFile(prefix="kept")  # noqa: SIM115
    kept.close()


def test_a_thread_is_a_leak():
    done = threading.Event()
    with pytest.raises(LeakError, match="thread forgotten"), no_leaks():
        threading.Thread(target=done.wait, name="forgotten", daemon=True).start()
    done.set()


def test_a_mapping_and_a_process_are_leaks():
    import mmap

    fd = os.memfd_create("frames")
    os.truncate(fd, 4096)
    with pytest.raises(LeakError, match="mapping of frames") as info, no_leaks():
        kept = mmap.mmap(fd, 4096)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert f"child process {child.pid}" in str(info.value)
    kept.close()
    os.close(fd)
    child.communicate(b"\n")


def test_an_exception_is_told_rather_than_what_it_left():
    with pytest.raises(ZeroDivisionError), no_leaks():
        kept = tempfile.TemporaryFile()  # noqa: SIM115
        raise ZeroDivisionError
    kept.close()


# --- the package and the pytest plugin ------------------------------------------------------------


def test_every_public_name_is_there_and_no_other():
    for name in fluxmoe.testing.__all__:
        assert getattr(fluxmoe.testing, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        fluxmoe.testing.nosuch  # noqa: B018


def test_neither_the_kit_nor_its_fixtures_cost_anything_before_they_are_used():
    code = """if True:
        import sys
        import fluxmoe.testing
        from fluxmoe.testing import check_eviction_policy, check_arbitration_policy
        assert not {"pytest", "hypothesis", "torch", "vllm"} & set(sys.modules)
        loaded = set(sys.modules)
        import pytest
        for name in [name for name in sys.modules if name.startswith("fluxmoe")]:
            del sys.modules[name]
        import _fluxmoe_pytest
        assert not [name for name in sys.modules if name.startswith("fluxmoe")]
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_fixtures_know_all_golden_traces():
    assert tuple(GOLDEN) == _fluxmoe_pytest.GOLDEN_NAMES


TESTS = """
from fluxmoe.testing import check_eviction_policy
import fluxmoe

class Lru(fluxmoe.EvictionPolicy):
    def score(self, view, pages):
        return view.last_use[pages]

class Plugin:
    @fluxmoe.hookimpl
    def fluxmoe_register_policies(self, register):
        register("mine", Lru)

def test_conforms():
    check_eviction_policy(Lru)

def test_golden(fluxmoe_golden, fluxmoe_registry):
    from fluxmoe.sim.simulator import simulate
    fluxmoe_registry.add(Plugin(), "mine")
    runs = [
        simulate(fluxmoe_golden.events, "mine", c, registry=fluxmoe_registry).misses
        for c in fluxmoe_golden.capacities
    ]
    assert tuple(runs) == fluxmoe_golden.misses["lru"]

def test_plan(fluxmoe_fault_plan):
    fluxmoe_fault_plan.arm("read", OSError("planned"))
    try:
        fluxmoe_fault_plan.reach("read")
    except OSError:
        assert fluxmoe_fault_plan.struck["read"] == 1

def test_tidy(fluxmoe_no_leaks):
    pass

def test_untidy(fluxmoe_no_leaks):
    test_untidy.kept = open(__file__)
"""


def test_others_can_use_the_fixtures(tmp_path):
    (tmp_path / "test_mine.py").write_text(TESTS)
    known = importlib.metadata.entry_points(group="pytest11").names
    plugin = [] if "fluxmoe" in known else ["-p", "_fluxmoe_pytest"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "9 passed, 1 error" in done.stdout or "10 passed, 1 error" in done.stdout, done.stdout
    assert "LeakError: left behind: open file" in done.stdout
