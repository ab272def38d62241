"""The class ``Snapshot``: a server's state at one point in time, read from its ``/metrics``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from fluxmoe.core.arbitration.messages import Decision
from fluxmoe.errors import EngineError
from fluxmoe.observe import server

SCHEMA_VERSION = 2

#: Metrics whose values are read separately for each combination of these labels.
_LABELS = {
    "fluxmoe_tenant_bytes": ("tenant", "kind"),
    "fluxmoe_limit_bytes": ("tenant", "kind"),
    "fluxmoe_policy_faults_total": ("kind", "policy"),
    "fluxmoe_split_changes_total": ("direction",),
}


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A server's policy.

    ``faults`` is the number of contained faults; ``replaced`` describes the last fault if the
    policy was permanently replaced.
    """

    kind: str
    name: str
    faults: int
    replaced: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A server's state, summed over its workers. Counters start at the server's startup.

    Attributes:
        schema_version: Incremented when a field changes its meaning or is removed.
        url: Address of the server.
        model: Name of the model in vLLM.
        version: FluxMoE's version.
        policies: The server's policies.
        limits: Operator limits, such as ``kv.max``, in bytes.
        budget_bytes, expert_bytes, kv_bytes: Bytes of the budget and of its tenants.
        slots, pages: Number of slots for expert pages, and number of the model's pages.
        hits, misses, prefetch_hits: Numbers of distinct experts, counted once per event.
        evictions: Number of evicted pages.
        loaded_bytes: Bytes copied into slots.
        stall_seconds: Time that layers waited for pages, in seconds.
        moves_to_kv, moves_to_experts, moves_failed: Numbers of moves of memory.
        decisions: The last decisions, oldest first.
        running, waiting: Numbers of requests.
        kv_usage: Fraction of the KV cache's blocks that requests use.
        preemptions: Number of times that a request lost its KV cache.
        tokens: Number of generated tokens.
        prefix_hits, prefix_queries: Numbers of tokens found and looked up in the prefix cache.
        token_gaps, token_gap_seconds: Number and total seconds of the intervals between two tokens
            of a request; an interval is about one step.
    """

    schema_version: int
    url: str
    model: str
    version: str
    policies: tuple[PolicyState, ...]
    limits: dict[str, int]
    budget_bytes: int
    expert_bytes: int
    kv_bytes: int
    slots: int
    pages: int
    hits: int
    misses: int
    prefetch_hits: int
    evictions: int
    loaded_bytes: int
    stall_seconds: float
    moves_to_kv: int
    moves_to_experts: int
    moves_failed: int
    decisions: tuple[Decision, ...]
    running: int
    waiting: int
    kv_usage: float
    preemptions: int
    tokens: int
    prefix_hits: int
    prefix_queries: int
    token_gaps: int
    token_gap_seconds: float


def fetch(url: str) -> Snapshot:
    """Read a server's metrics.

    Args:
        url: ``http://host:port``, with or without ``/metrics``.

    Raises:
        ConfigError: The address is not valid.
        EngineError: The server did not respond as expected, or has no FluxMoE metrics.
    """
    base = server.address(url)
    return read(_metrics(base), base)


def _metrics(base: str) -> str:
    status, body = server.ask(base, "/metrics")
    if status != 200:
        raise EngineError(
            f"the server responded with status {status}",
            where=f"{base}/metrics",
            fix="name the address of a vLLM server",
        )
    return body.decode(errors="replace")


def _samples(text: str, base: str) -> list[tuple[str, dict[str, str], float]]:
    try:
        return [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    except ValueError as error:
        raise EngineError(
            "the answer is not in Prometheus' text format",
            where=f"{base}/metrics",
            fix="name the address of a vLLM server",
        ) from error


def _foreign(base: str) -> EngineError:
    return EngineError(
        "the server has no FluxMoE metrics",
        where=f"{base}/metrics",
        fix="start it with `fluxmoe serve` and without disable-log-stats",
    )


def read(text: str, url: str) -> Snapshot:
    """Parse a snapshot from the text of a server's ``/metrics``.

    Raises:
        EngineError: The text is not in Prometheus format or lacks FluxMoE metrics.
    """
    sums: dict[str, float] = defaultdict(float)
    labelled: dict[tuple[str, ...], float] = defaultdict(float)
    replaced: dict[tuple[str, str], str] = {}
    decisions: list[Decision] = []
    texts: dict[str, str] = {}
    for name, labels, value in _samples(text, url):
        sums[name] += value
        if name in _LABELS:
            labelled[name, *(labels[label] for label in _LABELS[name])] += value
        elif name == "fluxmoe_policy_replaced":
            replaced[labels["kind"], labels["policy"]] = labels["reason"]
        elif name == "fluxmoe_split_decision":
            decisions.append(_decision(labels, value))
        elif name == "fluxmoe_info":
            texts["version"] = labels["version"]
        elif name == "fluxmoe_budget_bytes":
            texts["model"] = labels.get("model_name", "")
    if "model" not in texts:
        raise _foreign(url)

    def of(metric: str) -> Iterator[tuple[tuple[str, ...], int]]:
        return ((key[1:], int(value)) for key, value in labelled.items() if key[0] == metric)

    def count(name: str) -> int:
        return int(sums[name])

    return Snapshot(
        schema_version=SCHEMA_VERSION,
        url=url,
        model=texts["model"],
        version=texts.get("version", ""),
        policies=tuple(
            PolicyState(kind, name, faults, replaced.get((kind, name), ""))
            for (kind, name), faults in of("fluxmoe_policy_faults_total")
        ),
        limits={f"{tenant}.{kind}": size for (tenant, kind), size in of("fluxmoe_limit_bytes")},
        budget_bytes=count("fluxmoe_budget_bytes"),
        expert_bytes=int(labelled["fluxmoe_tenant_bytes", "experts", "committed"]),
        kv_bytes=int(labelled["fluxmoe_tenant_bytes", "kv", "committed"]),
        slots=count("fluxmoe_expert_slots"),
        pages=count("fluxmoe_expert_pages"),
        hits=count("fluxmoe_expert_hits_total"),
        misses=count("fluxmoe_expert_misses_total"),
        prefetch_hits=count("fluxmoe_prefetch_hits_total"),
        evictions=count("fluxmoe_expert_evictions_total"),
        loaded_bytes=count("fluxmoe_transfer_bytes_total"),
        stall_seconds=sums["fluxmoe_stall_seconds_total"],
        moves_to_kv=int(labelled["fluxmoe_split_changes_total", "to_kv"]),
        moves_to_experts=int(labelled["fluxmoe_split_changes_total", "to_experts"]),
        moves_failed=count("fluxmoe_split_failures_total"),
        decisions=tuple(sorted(decisions, key=lambda told: told.number)),
        running=count("vllm:num_requests_running"),
        waiting=count("vllm:num_requests_waiting"),
        kv_usage=sums["vllm:kv_cache_usage_perc"],
        preemptions=count("vllm:num_preemptions_total"),
        tokens=count("vllm:generation_tokens_total"),
        prefix_hits=count("vllm:prefix_cache_hits_total"),
        prefix_queries=count("vllm:prefix_cache_queries_total"),
        token_gaps=count("vllm:inter_token_latency_seconds_count"),
        token_gap_seconds=sums["vllm:inter_token_latency_seconds_sum"],
    )


def _decision(labels: Mapping[str, str], value: float) -> Decision:
    number, policy = int(labels["number"]), labels["policy"]
    return Decision(number, policy, labels["direction"], labels["reason"], int(value))


@dataclass(frozen=True, slots=True)
class Rates:
    """Changes between two snapshots, or since the server started.

    Attributes:
        seconds: Time between the snapshots in seconds; 0 if unknown. In that case ``tokens_per_s``,
            ``loaded_per_s`` and ``stall_share`` are 0 as well.
        hit_rate, prefix_rate: Fractions from 0 to 1; None if nothing was looked up.
        token_ms: Mean milliseconds between two tokens of a request; None if there were no such
            intervals.
        tokens_per_s, loaded_per_s: Generated tokens and loaded bytes per second.
        stall_share: Fraction of the time that layers spent waiting for pages.
    """

    seconds: float
    hit_rate: float | None
    prefix_rate: float | None
    token_ms: float | None
    tokens_per_s: float
    loaded_per_s: float
    stall_share: float


def rates(now: Snapshot, before: Snapshot | None = None, seconds: float = 0.0) -> Rates:
    """Compare two snapshots ``seconds`` apart; without ``before``, compute rates since startup.

    If the server was restarted in between, the counts start at the restart.
    """

    def change(field: str) -> float:
        value = float(getattr(now, field))
        old = 0.0 if before is None else float(getattr(before, field))
        return value - old if value >= old else value

    looked_up = change("hits") + change("misses")
    gaps, queries = change("token_gaps"), change("prefix_queries")
    return Rates(
        seconds=seconds,
        hit_rate=change("hits") / looked_up if looked_up else None,
        prefix_rate=change("prefix_hits") / queries if queries else None,
        token_ms=change("token_gap_seconds") / gaps * 1e3 if gaps else None,
        tokens_per_s=change("tokens") / seconds if seconds else 0.0,
        loaded_per_s=change("loaded_bytes") / seconds if seconds else 0.0,
        stall_share=min(change("stall_seconds") / seconds, 1.0) if seconds else 0.0,
    )
