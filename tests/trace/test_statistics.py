"""Statistics of ``trace info`` compared with their definitions in plain Python."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmoe.core.types import Phase
from fluxmoe.errors import TraceError
from fluxmoe.trace import StepRows, TraceMeta, TraceWriter, reader
from fluxmoe.trace.statistics import WINDOWS, describe, entropy, gini, top_share

LAYERS, EXPERTS, TOP_K = 3, 6, 2


def write(path, events, columns=()):
    """Write events (step, layer, phase, [(request, experts, predicted)])."""
    meta = TraceMeta("m", LAYERS, EXPERTS, TOP_K, None, "test")
    with TraceWriter(path, meta, columns=columns) as writer:
        for step, layer, phase, tokens in events:
            requests, ids, predicted = zip(*tokens, strict=True)
            writer.append(step, layer, np.asarray(ids), phase,
                          rows=StepRows(np.asarray(requests, np.int32),
                                        np.full(len(ids), phase, np.int8)),
                          predicted=np.asarray(predicted))  # fmt: skip


def reference(events):
    """Compute the same numbers in a simple, slow way."""
    steps = sorted({step for step, *_ in events})
    ordinal = {step: i for i, step in enumerate(steps)}
    pages = [{(la, e) for _, ids, _ in tokens for e in ids} for _, la, _, tokens in events]
    last, distances = {}, []
    for event, used in enumerate(pages):
        distances += [event - last[page] for page in used if page in last]
        last.update(dict.fromkeys(used, event))
    windows = {}
    for length in WINDOWS:
        whole = len(steps) // length
        sets = [set() for _ in range(whole)]
        for (step, *_), used in zip(events, pages, strict=True):
            if ordinal[step] // length < whole:
                sets[ordinal[step] // length] |= used
        if whole:
            windows[length] = (np.mean([len(s) for s in sets]), max(len(s) for s in sets))
    previous, shares = {}, defaultdict(list)
    for _, la, phase, tokens in events:
        for token, (request, ids, _) in enumerate(tokens):
            key = (la, request if request >= 0 else "prefill" if phase == 0 else f"row {token}")
            if key in previous:
                shares[la].append(len(set(ids) & previous[key]) / len(ids))
            previous[key] = set(ids)
    guessed = defaultdict(lambda: [0, 0])
    for (step, la, _, tokens), (s2, l2, _, t2) in itertools.pairwise(events):
        if step == s2 and la + 1 == l2 and len(tokens) == len(t2):
            for (_, _, guess), (_, ids, _) in zip(tokens, t2, strict=True):
                guessed[l2][0] += len(set(guess) & set(ids))
                guessed[l2][1] += len(ids)
    unions = defaultdict(list)
    for (*_, tokens), used in zip(events, pages, strict=True):
        unions[(len(tokens) - 1).bit_length()].append(len(used))
    return distances, windows, shares, guessed, unions, pages


@st.composite
def traces(draw):
    expert = st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True)
    requests = st.integers(-1, 3)
    events, step = [], 0
    for _ in range(draw(st.integers(1, 12))):
        step += draw(st.integers(1, 3))
        phase = draw(st.sampled_from(Phase))
        # In decode, the requests of a step are distinct, as in engines.
        size = draw(st.integers(1, 5))
        if phase == Phase.DECODE:
            who = draw(st.permutations(range(5)))[:size]
            who = [-1] * size if draw(st.booleans()) else who
        else:
            who = [draw(requests)] * size
        layers = draw(st.sets(st.integers(0, LAYERS - 1), min_size=1))
        for layer in sorted(layers):
            tokens = [(r, draw(expert), draw(expert)) for r in who]
            events.append((step, layer, phase, tokens))
    return events


@settings(max_examples=80, deadline=None)
@given(traces(), st.sampled_from([1, 3, 1 << 17]))
def test_equals_the_definitions(tmp_path_factory, events, batch):
    path = tmp_path_factory.mktemp("statistics") / "t"
    write(path, events, ["predicted"])
    distances, windows, shares, guessed, unions, pages = reference(events)
    with pytest.MonkeyPatch.context() as patch:
        # The statistics drop streams absent from a batch (see below), so the overlap is compared
        # only for large batches; the other numbers are compared for any size.
        patch.setattr(reader, "GROUP_ROWS", batch)
        found = describe(path)
    assert found.events == len(events)
    assert found.steps == len({step for step, *_ in events})
    assert found.prefill_events == sum(phase == 0 for *_, phase, _ in events)
    assert found.rows == sum(len(tokens) for *_, tokens in events)
    assert found.routed == found.rows * TOP_K
    assert found.accesses == sum(map(len, pages))
    assert found.pages_used == len(set().union(*pages))
    assert (found.reuse.reuses, found.reuse.first_uses) == (
        len(distances), found.accesses - len(distances))  # fmt: skip
    histogram = [0] * len(found.reuse.histogram)
    for distance in distances:
        histogram[distance.bit_length() - 1] += 1
    assert found.reuse.histogram == histogram
    for q, value in found.reuse.quantiles.items():
        ordered = sorted(distances)
        assert value == ordered[max(0, int(np.ceil(float(q) * len(ordered))) - 1)]
    assert {w.steps: (w.mean_pages, w.max_pages) for w in found.working_sets} == {
        length: (pytest.approx(mean), most) for length, (mean, most) in windows.items()
    }
    assert {(u.tokens_to - 1).bit_length(): (u.events, u.mean_experts) for u in found.unions} == {
        bits: (len(sizes), pytest.approx(np.mean(sizes))) for bits, sizes in unions.items()
    }
    for layer, one in enumerate(found.layers):
        hits, wanted = guessed[layer]
        assert one.predicted == (pytest.approx(hits / wanted) if wanted else None)
        if batch > 1000:
            mine = shares[layer]
            assert one.overlap == (pytest.approx(np.mean(mine)) if mine else None)


@pytest.mark.parametrize("group", [4, 1 << 17])
def test_a_request_that_every_batch_shows_is_never_forgotten(tmp_path, monkeypatch, group):
    tokens = [
        [(0, [0, 1], [0, 0]), (7, [2, 3], [0, 0])],
        [(7, [2, 4], [0, 0]), (0, [1, 0], [0, 0])],
    ]
    write(tmp_path / "t", [(s, 0, Phase.DECODE, tokens[s % 2]) for s in range(40)])
    monkeypatch.setattr(reader, "GROUP_ROWS", group)
    # Request 0 has the same experts each time, and request 7 has half of them again.
    assert describe(tmp_path / "t").layers[0].overlap == pytest.approx(0.75)


def test_memory_does_not_grow_with_requests(tmp_path, monkeypatch):
    write(tmp_path / "t", [(s, 0, Phase.DECODE, [(s, [0, 1], [0, 0])]) for s in range(500)])
    monkeypatch.setattr(reader, "GROUP_ROWS", 10)
    from fluxmoe.trace import statistics

    made = []
    original = statistics.Streams
    monkeypatch.setattr(statistics, "Streams", lambda meta: made.append(original(meta)) or made[0])
    assert describe(tmp_path / "t").requests == 500
    assert len(made[0]._last) <= 22


def test_measures_of_skew():
    equal, one = np.full(10, 0.1), np.eye(10)[3]
    assert gini(equal) == pytest.approx(0) and gini(one) == pytest.approx(0.9)
    assert entropy(equal) == pytest.approx(1) and entropy(one) == pytest.approx(0)
    assert top_share(equal) == pytest.approx(0.1) and top_share(one) == 1
    linear = np.arange(1, 5) / 10
    pairs = np.abs(linear[:, None] - linear[None]).mean() / (2 * linear.mean())
    assert gini(linear) == pytest.approx(pairs)
    assert (gini(np.zeros(3)), entropy(np.zeros(3)), entropy(np.ones(1))) == (0, 1, 1)


def test_a_damaged_trace(tmp_path):
    (tmp_path / "t").write_text("no")
    with pytest.raises(TraceError, match="not a Parquet file"):
        describe(tmp_path / "t")
