"""The virtual clock compared with times computed by hand, and hardware profiles."""

import numpy as np
import pytest

from fluxmoe.errors import ConfigError
from fluxmoe.sim import hardware
from fluxmoe.sim.hardware import Profile
from fluxmoe.sim.simulator import simulate
from tests.sim.test_simulator import in_memory

#: A page of 1 MB takes 1 ms to load, and a layer computes for 0.5 ms.
SIMPLE = Profile(name="simple", load_gbps=1, memory_gbps=1e9, tflops=1e9, layer_us=500)
ROWS = [(0, 0, [0]), (0, 1, [0]), (1, 0, [0]), (1, 1, [1])]


def timed(rows, capacity, prefetch="none", profile=SIMPLE, top_k=1, **arguments):
    events = in_memory(rows, 2, 2, top_k, page_bytes=1_000_000)
    return simulate(events, "lru", capacity, prefetch, hardware=profile, **arguments)


def test_demand_copies_stand_in_the_way(registry):
    timing = timed(ROWS, 4, registry=registry).timing
    # Two misses in the first step and one in the second, 1 ms each; two layers per step.
    assert timing.seconds == pytest.approx(5.0e-3, rel=1e-6)
    assert timing.step_ms_mean == pytest.approx(2.5, rel=1e-6)
    assert timing.step_ms_p50 == pytest.approx(2.5, rel=1e-6)
    assert timing.stall_share == pytest.approx(3 / 5, rel=1e-6)
    assert timing.tokens_per_s == pytest.approx(2 / 5.0e-3, rel=1e-6)
    assert timing.hardware == "simple"


def test_prefetched_copies_overlap_with_computing(registry):
    timing = timed(ROWS, 4, "next-layer", registry=registry).timing
    # 0.0: page 0 is demanded and arrives at 1.0; 2 and 3 are proposed, and 2 is copied until 2.0.
    # 1.5: page 2 is needed and arrives at 2.0; page 1 is proposed, after 3; the layer ends at 2.5.
    # 2.5: page 0 hits, and the layer ends at 3.0. Page 3 was copied from 2.0 to 3.0: no wait.
    assert timing.seconds == pytest.approx(3.5e-3, rel=1e-6)
    assert timing.stall_share == pytest.approx(1.5 / 3.5, rel=1e-6)
    assert timing.step_ms_p95 == pytest.approx(1.0 + 0.95 * 1.5, rel=1e-6)


def test_a_page_whose_copy_has_not_begun_is_copied_at_once(registry):
    rows = [(0, 0, [0]), (0, 1, [1])]
    timing = timed(rows, 4, "next-layer", registry=registry).timing
    # Pages 2 and 3 are proposed at 1.0, and page 2 is copied until 2.0. Page 3, which is needed at
    # 1.5, is next and arrives at 3.0.
    assert timing.seconds == pytest.approx(3.5e-3, rel=1e-6)


def test_what_a_layer_computes(registry):
    profile = Profile(
        name="x", load_gbps=1, load_us=10, memory_gbps=2, tflops=4e-3, weight_bytes=4,
        step_us=1000, layer_us=100, token_us=7,
    )  # fmt: skip
    rows = [(0, 0, [0, 1, 1, 0, 0, 1])]  # three tokens, two experts
    read, work, other = 2 * 500, 6 * 2 * 250_000 / 4e9 * 1e6, 1000 + 100 + 3 * 7
    demand = 10 + 2 * 1000
    for roofline, experts in (True, max(read, work)), (False, read + work):
        machine = profile.model_copy(update={"roofline": roofline})
        timing = timed(rows, 4, profile=machine, top_k=2, registry=registry).timing
        assert timing.seconds * 1e6 == pytest.approx(demand + experts + other, rel=1e-9)
        assert timing.tokens_per_s == pytest.approx(3 / timing.seconds)


def test_timing_changes_no_counter(registry):
    rng = np.random.default_rng(2)
    rows = [(step, layer, [int(rng.integers(2))]) for step in range(60) for layer in range(2)]
    for prefetch in ("none", "next-layer"):
        with_clock = timed(rows, 2, prefetch, registry=registry).to_json()
        without = timed(rows, 2, prefetch, None, registry=registry).to_json()
        assert {key: with_clock[key] for key in without} == without
        assert set(with_clock) - set(without) >= {"step_ms_mean", "stall_share", "tokens_per_s"}


def test_a_trace_without_page_size_cannot_be_timed(registry):
    events = in_memory(ROWS, 2, 2, 1, page_bytes=None)
    with pytest.raises(ConfigError, match="no page size"):
        simulate(events, "lru", 4, hardware=SIMPLE, registry=registry)


@pytest.mark.parametrize("name", hardware.names())
def test_shipped_profiles_are_valid_and_named_like_their_file(name):
    profile = hardware.load(name)
    assert profile.name == name
    assert "not measured" in profile.description


def test_a_profile_survives_its_file(tmp_path):
    hardware.save(SIMPLE, tmp_path / "p.yaml")
    assert hardware.load(tmp_path / "p.yaml") == SIMPLE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nload_gbps: -1\nmemory_gbps: 1\ntflops: 1\n", "load_gbps: .*greater than 0"),
        ("name: x\nload_gbps: 1\nmemory_gbps: 1\n", "tflops: Field required"),
        ("name: x\nload_gbps: 1\nmemory_gbps: 1\ntflops: 1\nwarp: 9\n", "warp: Extra inputs"),
        ("[1, 2]\n", "the document: "),
        ("a: [\n", "not valid YAML"),
        ("name: x\nload_gbps: .inf\nmemory_gbps: 1\ntflops: 1\n", "load_gbps: .*finite"),
    ],
)
def test_a_wrong_profile_names_the_field(tmp_path, text, message):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        hardware.load(path)


def test_an_unknown_profile_lists_the_known():
    with pytest.raises(ConfigError, match=r"unknown hardware profile 'abacus'.*h100-pcie5"):
        hardware.load("abacus")
