"""Synthetic traces: the same file for the same seed, and the requested popularity."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from fluxmoe.errors import ConfigError
from fluxmoe.sim.events import Events
from fluxmoe.trace.synth import Workload, write


def routing(**changes):
    workload = Workload(**{**dict(layers=3, experts=16, top_k=4, steps=400, batch=2), **changes})
    return np.stack(list(workload.routing()))


def test_the_same_seed_gives_the_same_file(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        write(Workload(3, 16, 4, 20, 2, seed=seed), path)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert Events.load(paths[0]).ids.tolist() != Events.load(paths[2]).ids.tolist()
    assert other != first


def test_shape_and_distinct_experts():
    got = routing()
    assert got.shape == (400, 3, 2, 4)
    assert got.min() >= 0 and got.max() == 15
    assert all(len(set(row)) == 4 for row in got.reshape(-1, 4).tolist())


def test_every_expert_where_top_k_is_all():
    got = np.sort(routing(top_k=16, steps=3), axis=-1)
    assert (got == np.arange(16)).all()


def test_skew_is_zipf_and_differs_per_layer():
    got = routing(top_k=1, steps=20_000, skew=1.0, drift=0.0)
    expected = 1 / np.arange(1, 17)
    expected /= expected.sum()
    orders = []
    for layer in range(3):
        share = np.bincount(got[:, layer].ravel(), minlength=16) / got[:, layer].size
        orders.append(np.argsort(-share).tolist())
        np.testing.assert_allclose(np.sort(share)[::-1], expected, atol=0.01)
    assert orders[0] != orders[1] != orders[2]


def test_no_skew_is_uniform():
    share = np.bincount(routing(top_k=1, steps=20_000, skew=0.0).ravel(), minlength=16)
    np.testing.assert_allclose(share / share.sum(), 1 / 16, atol=0.005)


def test_drift_changes_who_is_popular():
    def overlap(drift):
        got = routing(top_k=1, steps=6_000, drift=drift, skew=1.5)[:, 0].reshape(2, -1)
        early, late = (np.bincount(half, minlength=16) for half in got)
        return np.corrcoef(early, late)[0, 1]

    assert overlap(0.0) > 0.99
    # At this drift, 6,000 steps are several lifetimes of a ranking, so the halves differ.
    assert overlap(0.05) < 0.9


@pytest.mark.parametrize(
    "changes",
    [{"layers": 0}, {"top_k": 17}, {"steps": 0}, {"batch": -1}, {"seed": -1}, {"skew": -0.1},
     {"drift": 1.5}, {"locality": (0.5, 1.5)}, {"scan_every": -1}],
)  # fmt: skip
def test_nonsense(changes):
    with pytest.raises(ConfigError, match=next(iter(changes)).replace("_", "-")):
        routing(**changes)


def kept(got):
    """Compute, per layer, the share of experts that a request's next token reuses."""
    one, following = got[:-1], got[1:]
    again = (one[..., :, None] == following[..., None, :]).any(axis=-1)
    return again.mean(axis=(0, 2, 3))


def test_locality_is_that_of_each_layer():
    free = kept(routing(layers=5, drift=0.0, skew=0.0))
    np.testing.assert_allclose(free, 4 / 16, atol=0.03)
    got = kept(routing(layers=5, drift=0.0, skew=0.0, locality=(0.8, 0.0)))
    # An expert stays with probability p; otherwise, it may still be drawn again.
    assert got[0] > 0.8 and abs(got[-1] - 4 / 16) < 0.03
    assert (np.diff(got) < 0).all()
    assert kept(routing(locality=(1.0, 1.0))).tolist() == [1, 1, 1]


def test_scans_use_every_expert_in_the_fewest_tokens():
    steps = list(Workload(3, 10, 4, 9, 2, scan_every=3).routing())
    for step, got in enumerate(steps):
        if step % 3 < 2:
            assert got.shape == (3, 2, 4)
            continue
        assert got.shape == (3, 3, 4)
        assert all(set(layer.ravel().tolist()) == set(range(10)) for layer in got)
        assert all(len(set(token)) == 4 for layer in got for token in layer.tolist())
    assert steps[2].tolist() != steps[5].tolist()


def test_scans_are_prefill_and_decode_has_requests(tmp_path):
    write(Workload(2, 8, 2, 4, 3, scan_every=2), tmp_path / "t")
    rows = pq.ParquetFile(tmp_path / "t").read().to_pylist()
    assert {(r["step"], r["phase"]) for r in rows} == {(0, 1), (1, 0), (2, 1), (3, 0)}
    assert [r["request"] for r in rows if (r["step"], r["layer"]) == (0, 1)] == [0, 1, 2]
    assert {r["request"] for r in rows if r["phase"] == 0} == {-1}


def test_it_is_written_in_a_stream(tmp_path, monkeypatch):
    """A step is written after at most a few more have been generated."""
    from fluxmoe.trace import synth

    made, held = [0], []
    original = Workload.routing

    def routing(self):
        for step in original(self):
            made[0] += 1
            yield step

    class Watched(synth.TraceWriter):
        def __init__(self, *args, **more):
            super().__init__(*args, **more, group_rows=50)

        def append(self, *args, **more):
            super().append(*args, **more)
            held.append(self._rows)

    monkeypatch.setattr(Workload, "routing", routing)
    monkeypatch.setattr(synth, "TraceWriter", Watched)
    assert write(Workload(2, 8, 2, 100, 5), tmp_path / "t") == (200, 2000)
    assert made[0] == 100 and max(held) < 50
