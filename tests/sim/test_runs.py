"""Many runs at once, in several processes, and the report of these runs."""

import html.parser
import itertools
import re

import numpy as np
import pytest

from fluxmoe.errors import ConfigError, UnknownPolicyError
from fluxmoe.sim import hardware, report
from fluxmoe.sim.events import Events
from fluxmoe.sim.runs import RunPlan, SimulationRun, default_jobs, execute
from fluxmoe.trace.synth import Workload, write

RUNS = [
    SimulationRun(policy, capacity, prefetch)
    for policy in ("lru", "mru", "belady")
    for capacity in ("30%", "60%")
    for prefetch in ("none", "next-layer")
]


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "trace.parquet"
    write(Workload(4, 16, 3, 60, 2, seed=5), path)
    return Events.load(path)


@pytest.fixture(scope="module")
def plan(plugin_file):
    return RunPlan(RUNS, [str(plugin_file)], hardware=hardware.load("laptop-nvme"))


@pytest.fixture(scope="module")
def outcomes(events, plan, registry):
    seen = []
    found = execute(plan, events, registry, bins=12, progress=seen.append)
    assert sum(seen) == len(RUNS) * len(events)
    return found


def test_results_come_in_the_order_of_the_runs(outcomes):
    asked = [(run.policy, run.prefetch) for run in RUNS]
    assert [(o.result.policy, o.result.prefetch) for o in outcomes] == asked
    assert [o.oracle for o in outcomes] == [run.policy == "belady" for run in RUNS]


def test_processes_give_the_same(events, plan, registry, outcomes):
    seen = []
    found = execute(plan, events, registry, jobs=2, bins=12, progress=seen.append)
    assert sum(seen) == len(RUNS) * len(events)
    for mine, theirs in zip(found, outcomes, strict=True):
        assert mine.result == theirs.result
        assert mine.oracle == theirs.oracle
        assert np.array_equal(mine.timeline, theirs.timeline)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_mistake_in_the_last_run_shows_before_the_first(events, registry, jobs):
    plan = RunPlan([SimulationRun("lru", "50%"), SimulationRun("lrru", "50%")])
    ran = []
    with pytest.raises(UnknownPolicyError, match="lrru"):
        execute(plan, events, registry, jobs=jobs, progress=ran.append)
    assert not ran


def test_the_timeline_is_the_hit_rate_in_parts(events, outcomes):
    for outcome in outcomes:
        assert len(outcome.timeline) == 12
        parts = np.linspace(0, len(events), 13).astype(int)
        weights = [events.sizes[a:b].sum() for a, b in itertools.pairwise(parts)]
        mean = np.average(outcome.timeline, weights=weights)
        assert mean == pytest.approx(outcome.result.hit_rate)


def test_small_work_stays_in_one_process(events):
    assert default_jobs(events, 100) == 1


class _Page(html.parser.HTMLParser):
    VOID = ("meta", "line", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path, events, outcomes):
    path = tmp_path / "out.html"
    report.write(path, "a <trace>", events, outcomes)
    text = path.read_text()
    page = _Page()
    page.feed(text)
    assert not page.open
    assert not page.links and "script" not in page.tags and "url(" not in text
    assert "http" not in text
    assert "a &lt;trace&gt;" in text and "<trace>" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("svg") == len({report.name_of(o.result) for o in outcomes}) + 2 + 2
    for outcome in outcomes:
        assert f"{outcome.result.misses:,}" in text
        assert f"{outcome.result.timing.tokens_per_s:,.1f}" in text
    optimum = {
        o.result.capacity_pages: o.result.misses
        for o in outcomes
        if report.name_of(o.result) == report.OPTIMUM
    }
    lru = outcomes[0].result
    assert f"<td>{lru.misses / optimum[lru.capacity_pages]:.2f}</td>" in text


def test_the_curves_show_the_hit_rates(tmp_path, events, outcomes):
    path = tmp_path / "out.html"
    report.write(path, "trace", events, outcomes)
    titles = re.findall(r"<title>([^<]*): ([\d.]+)%</title>", path.read_text())
    rates = {name: float(rate) for name, rate in titles[: len(titles) // 2]}
    misses = {name: float(rate) for name, rate in titles[len(titles) // 2 :]}
    for outcome in outcomes:
        name = f"{report.name_of(outcome.result)}, {outcome.result.capacity_pages} pages"
        assert rates[name] == pytest.approx(100 * outcome.result.hit_rate, abs=0.005)
        assert misses[name] == pytest.approx(100 - 100 * outcome.result.hit_rate, abs=0.01)


def test_a_report_that_cannot_be_written(tmp_path, events, outcomes):
    with pytest.raises(ConfigError, match="cannot write the file"):
        report.write(tmp_path / "no" / "out.html", "t", events, outcomes)
