"""``fluxmoe top``: screens and JSON from servers' metrics, and errors if there are no metrics."""

import dataclasses
import json
import re
import time
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from fluxmoe.cli import top
from fluxmoe.cli.shared import output
from fluxmoe.observe import snapshot
from tests.commandline import command, fails, succeeds
from tests.web import served

#: Unix time of decision 0, which is noon in local time.
NOON = int(time.mktime((2026, 1, 2, 12, 0, 0, 0, 0, -1)))
LABELS = {"model_name": "m", "engine": "0"}


def metrics(*, faults=0, replaced="", **changes):
    """Make the metrics of a server with two tenants and two decisions."""
    values = {
        ("fluxmoe_budget_bytes", ()): 1000 * 4096,
        ("fluxmoe_info", (("version", "1.2.3"),)): 1,
        ("fluxmoe_tenant_bytes", (("tenant", "experts"), ("kind", "committed"))): 600 * 4096,
        ("fluxmoe_tenant_bytes", (("tenant", "kv"), ("kind", "committed"))): 300 * 4096,
        ("fluxmoe_tenant_bytes", (("tenant", "kv"), ("kind", "max"))): 900 * 4096,
        ("fluxmoe_limit_bytes", (("tenant", "kv"), ("kind", "max"))): 1 << 20,
        ("fluxmoe_policy_faults_total", (("kind", "eviction"), ("policy", "mru"))): faults,
        ("fluxmoe_expert_slots", ()): 60,
        ("fluxmoe_expert_pages", ()): 64,
        ("fluxmoe_expert_hits_total", ()): 300,
        ("fluxmoe_expert_misses_total", (("cause", "cold"),)): 60,
        ("fluxmoe_expert_misses_total", (("cause", "capacity"),)): 40,
        ("fluxmoe_transfer_bytes_total", (("store", "host"), ("cause", "demand"))): 1 << 20,
        ("fluxmoe_stall_seconds_total", ()): 0.5,
        ("fluxmoe_split_changes_total", (("direction", "to_kv"),)): 7,
        ("fluxmoe_split_changes_total", (("direction", "to_experts"),)): 5,
        ("vllm:num_requests_running", ()): 3,
        ("vllm:num_requests_waiting", ()): 9,
        ("vllm:kv_cache_usage_perc", ()): 0.5,
        ("vllm:generation_tokens_total", ()): 1000,
        ("vllm:inter_token_latency_seconds_count", ()): 500,
        ("vllm:inter_token_latency_seconds_sum", ()): 10.0,
        **{(name, ()): value for name, value in changes.items()},
    }
    for number, direction in ((9, "to_kv"), (10, "to_experts")):
        told = {"number": number, "policy": "marginal", "direction": direction,
                "reason": f"[{number}] running"}  # fmt: skip
        values["fluxmoe_split_decision", tuple(told.items())] = NOON + number
    if replaced:
        why = {"kind": "eviction", "policy": "mru", "reason": replaced}
        values["fluxmoe_policy_replaced", tuple(why.items())] = 1
    registry, made = CollectorRegistry(), {}
    for (name, labels), value in values.items():
        names = [*LABELS, *(label for label, _ in labels)]
        if name not in made:
            made[name] = Gauge(name, "help", names, registry=registry)
        made[name].labels(*LABELS.values(), *(text for _, text in labels)).set(value)
    return generate_latest(registry)


@pytest.fixture
def serve():
    """Serve bodies in turn, and repeat the last one."""

    def start(*bodies, status=200):
        waiting = list(bodies)

        def answer(request):
            body = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            return (status, body) if request.path == "/metrics" else (404, b"")

        return servers.enter_context(served(answer))

    with ExitStack() as servers:
        yield start


def test_json_is_the_snapshot(serve):
    url = serve(metrics())
    shown = json.loads(succeeds("top", url, "--json"))
    assert set(shown) == {f.name for f in dataclasses.fields(snapshot.Snapshot)} | {"rates"}
    assert (shown["schema_version"], shown["model"], shown["url"]) == (2, "m", url)
    assert (shown["version"], shown["limits"]) == ("1.2.3", {"kv.max": 1 << 20})
    (policy,) = shown["policies"]
    assert policy == {"kind": "eviction", "name": "mru", "faults": 0, "replaced": ""}
    assert shown["budget_bytes"] == 4096000
    assert (shown["expert_bytes"], shown["kv_bytes"]) == (600 * 4096, 300 * 4096)
    assert (shown["hits"], shown["misses"]) == (300, 100)
    assert (shown["moves_to_kv"], shown["moves_to_experts"]) == (7, 5)
    assert [told["number"] for told in shown["decisions"]] == [9, 10]
    assert [told["time"] for told in shown["decisions"]] == [NOON + 9, NOON + 10]
    for address in (url.removeprefix("http://"), f"{url}/", f"{url}/metrics"):
        assert json.loads(succeeds("top", address, "--json"))["url"] == url


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Replace the clock, so that sleeping returns at once and advances the time."""
    now = [0.0]
    monkeypatch.setattr("time.sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr("time.monotonic", lambda: now[0])


def test_c7_once_and_json_show_rates_of_an_interval(serve):
    later = {"fluxmoe_expert_hits_total": 390, "vllm:generation_tokens_total": 1100}
    for option, interval, rate in (("--json", [], 100), ("--once", ["--interval", "4"], 25)):
        shown = succeeds("top", serve(metrics(), metrics(**later)), option, *interval)
        if option == "--json":
            rates = json.loads(shown)["rates"]
            assert (rates["seconds"], rates["tokens_per_s"], rates["hit_rate"]) == (1, rate, 1)
        else:
            assert "last 4 s" in shown and f"{rate}.0/s" in shown


@pytest.mark.parametrize("width", [80, 100, 200])
def test_c7_columns_do_not_jump(width):
    """All lines in the upper part of a screen have the same columns, whatever the numbers are."""
    console = output.console()
    console.width = width

    def places(**changes):
        now = snapshot.read(metrics(**changes).decode(), "u")
        before = snapshot.read(metrics().decode(), "u")
        with console.capture() as shown:
            console.print(top.frame(now, snapshot.rates(now, before, 1.0), width))
        lines = shown.get().partition("Last decisions")[0].splitlines()
        assert max(map(len, lines)) <= width
        words = ("preempted", "prefix hit rate", "tokens", "waited for them", "failed", "% in use")
        found = {word: line.index(word) for word in words for line in lines if word in line}
        assert set(found) == set(words)
        return found, "\n".join(lines)

    small, _ = places()
    large, text = places(**{
        "fluxmoe_budget_bytes": 1 << 44,
        "fluxmoe_expert_slots": 123456, "fluxmoe_expert_pages": 654321,
        "vllm:num_requests_running": 1234, "vllm:num_requests_waiting": 12345,
        "vllm:generation_tokens_total": 10**9, "vllm:num_preemptions_total": 10**9,
    })  # fmt: skip
    assert small == large
    for number in (
        "123456 of 654321",
        "1234 running, 12345 waiting",
        "999999000.0/s",
        "1000000000",
    ):
        assert number in text


def test_one_frame(serve):
    frame = succeeds("top", serve(metrics()), "--once")
    for words in (
        r"experts +█+ +2\.3 MiB +60% +60 of 64 pages",
        r"KV cache +█+ +1\.2 MiB +30% +50% in use",
        r"3 running, 9 waiting",
        r"FluxMoE 1\.2\.3: mru",
        r"operator limits: kv\.max 1\.0 MiB",
        r"7 to KV, 5 to experts",
        r"12:00:09 memory moves to the KV cache \(marginal\): \[9\] running",  # no markup
        r"12:00:10 memory moves to the experts \(marginal\)",
    ):
        assert re.search(words, frame), words
    assert "mru failed" not in frame
    frame = succeeds("top", serve(metrics(faults=3)), "--once")
    assert "eviction policy mru failed 3 times" in frame
    frame = succeeds("top", serve(metrics(faults=16, replaced="score [red] gave NaN")), "--once")
    assert "eviction policy mru was replaced after 16 faults: score [red] gave NaN" in frame


def test_rates_are_those_of_the_interval():
    before = snapshot.read(metrics().decode(), "u")
    after = snapshot.read(
        metrics(
            **{"fluxmoe_expert_hits_total": 390, "vllm:generation_tokens_total": 1100}
        ).decode(),
        "u",
    )
    rates = snapshot.rates(after, before, 2.0)
    assert rates.hit_rate == 1.0
    assert rates.tokens_per_s == 50
    assert rates.token_ms is None and rates.stall_share == 0
    again = snapshot.rates(before, after, 2.0)  # the server was restarted
    assert again.hit_rate == 1.0 and again.tokens_per_s == 500
    console = output.console()
    with console.capture() as shown:
        console.print(top.frame(after, rates, 80))
    assert "last 2 s" in shown.get() and "50.0/s" in shown.get()


def test_it_watches_until_told_to_stop_and_waits_for_a_server_that_is_gone(serve, monkeypatch):
    url = serve(metrics())
    frames, seconds = [], iter(range(5))
    monkeypatch.setattr("rich.live.Live.update", lambda self, frame, **_: frames.append(frame))

    def sleep(_):
        second = next(seconds)
        if second == 1:
            monkeypatch.setattr(snapshot, "fetch", gone)
        if second == 4:
            raise KeyboardInterrupt

    def gone(url):
        from fluxmoe.errors import EngineError

        raise EngineError("no response from the server: gone")

    monkeypatch.setattr("time.sleep", sleep)
    succeeds("top", url)
    assert len(frames) == 4
    console = output.console()
    with console.capture() as shown:
        console.print(frames[-1])
    assert "gone; waiting" in shown.get() and "Last decisions" in shown.get()


def test_what_does_not_answer_as_it_should(serve):
    fails(
        "top",
        "http://127.0.0.1:9",
        "--once",
        code="FM405",
        message="no response from the server.*serve",
    )
    fails("top", "http://127.0.0.1:9", code="FM405", message="no response from the server")
    fails("top", "x y", "--json", code="FM101", message="not a valid server address: 'x y'")
    fails("top", "ftp://host", "--json", code="FM101", message="not a valid server address")
    stock = b"# TYPE x gauge\nx 1\n"
    fails("top", serve(stock), "--once", code="FM405", message="has no FluxMoE metrics.*serve")
    fails("top", serve(b"<html>hello there</html>"), "--once", code="FM405", message="")
    fails("top", serve(b"", status=401), "--once", code="FM405", message="status 401")
    fails("top", serve(b"\xff\xfe"), "--once", code="FM405", message="")


def test_from_a_process_of_its_own(serve):
    assert "Last decisions" in succeeds("top", serve(metrics()), "--once", run=command)
