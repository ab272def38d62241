"""The measurement of a machine: the fit, the decoded tokens, and a profile for the simulator."""

import numpy as np
import pytest

import fluxmoe
from fluxmoe.backends.torch import measure
from fluxmoe.sim import hardware
from fluxmoe.sim.simulator import simulate


def test_the_fit_finds_costs_that_explain_the_times():
    rows = np.array([(1.0, batch, used) for batch, used in ((1, 8), (4, 25), (16, 50), (64, 64))])
    assert measure._fit(rows, rows @ [300.0, 2.5, 40.0]) == pytest.approx([300, 2.5, 40])


def test_no_cost_is_negative():
    rows = np.array([(1.0, n) for n in (1, 2, 4, 8)])
    constant, each = measure._fit(rows, np.array([9.0, 20.0, 41.0, 83.0]))  # unbounded: −1.6 + …
    assert constant == 0
    assert each == pytest.approx(10, rel=0.05)


def test_what_costs_nothing_is_very_fast():
    assert measure._gbps(1000, 0.0) == 1e6
    assert measure._gbps(3_000_000, 1000.0) == pytest.approx(3.0)


def test_the_same_tokens_whatever_is_paged(load):
    """Timed runs and recorded runs must process the same tokens."""
    model = load()
    seen = []
    for pages in (16, 32):
        with fluxmoe.page(model, measure.room(model, pages), eviction="lru") as handle:
            for _ in measure.decode(model, 2, 5):
                pass
            seen.append(handle.stats()["accesses"])
    assert seen[0] == seen[1]


def test_a_measured_profile_times_a_recording(checkpoint, load, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "BATCHES", (1, 2, 3))
    monkeypatch.setattr(measure, "_STEPS", 3)
    monkeypatch.setattr(measure, "_COPIES", 20)
    profile = hardware.Profile(**measure.measure(checkpoint()))
    assert profile.name == "this-cpu" and not profile.roofline
    hardware.save(profile, tmp_path / "cpu.yaml")
    model = load()
    with fluxmoe.page(model, measure.room(model, 20), eviction="lru") as handle:
        run = measure.decode(model, 2, 5)
        next(run)
        handle.reset()
        with handle.record(tmp_path / "trace.parquet"):
            for _ in run:
                pass
        counted = handle.stats()
    result = simulate(
        tmp_path / "trace.parquet", "lru", counted["slots"], hardware=tmp_path / "cpu.yaml"
    )
    assert (result.hits, result.misses) == (counted["hits"], counted["misses"])
    assert result.timing.seconds > 0
    assert result.timing.tokens_per_s == pytest.approx(2 * 5 / result.timing.seconds)
