"""Every metric of the project: names, labels and meaning.

Owns: the definitions and the registry they live in. Does not own: who counts, or the HTTP route that shows them.
Invariant: no label takes its values from a client (routes and statuses are from fixed sets, models from the settings).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds to the first token: from a cached prompt on a fast machine to a long prompt behind a full queue.
TTFT_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)
DURATION_BUCKETS = (0.01, 0.05, 0.25, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
RECOVERY_BUCKETS = (0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 10.0, 20.0, 60.0, 300.0)


class GatewayMetrics:
    """What a gateway counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "mlx_cluster_gateway_requests",
            "HTTP requests answered (499: the client left before its answer)",
            ["route", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "mlx_cluster_gateway_request_seconds",
            "Seconds from the request's head to the end of its answer",
            ["route"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "mlx_cluster_gateway_in_flight", "Generation requests being served now", registry=registry
        )
        self.prompt_tokens = Counter(
            "mlx_cluster_gateway_prompt_tokens", "Prompt tokens of admitted requests", ["model"], registry=registry
        )
        self.cached_tokens = Counter(
            "mlx_cluster_gateway_cached_tokens",
            "Prompt tokens that the prefix cache already held",
            ["model"],
            registry=registry,
        )
        self.completion_tokens = Counter(
            "mlx_cluster_gateway_completion_tokens", "Tokens received from engines", ["model"], registry=registry
        )
        self.key_requests = Counter(
            "mlx_cluster_gateway_key_requests",
            "Generation requests by the name of their key (other: not listed in the settings; none: without a key)",
            ["key"],
            registry=registry,
        )
        self.key_tokens = Counter(
            "mlx_cluster_gateway_key_tokens",
            "Prompt and completion tokens by the name of the key",
            ["key", "kind"],
            registry=registry,
        )
        self.ttft_seconds = Histogram(
            "mlx_cluster_gateway_ttft_seconds",
            "Seconds from a parsed request to its first token",
            ["model"],
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self.broken_streams = Counter(
            "mlx_cluster_gateway_broken_streams",
            "Sequences whose engine was lost, and that were asked for again",
            ["model"],
            registry=registry,
        )
        self.recovery_seconds = Histogram(
            "mlx_cluster_gateway_recovery_seconds",
            "Seconds from the loss of an engine until another one took the request's sequences up again",
            ["model"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.stream_errors = Counter(
            "mlx_cluster_gateway_stream_errors",
            "Streams that ended with an error event after their status was sent",
            ["code"],
            registry=registry,
        )

    def count_key(self, key: str, prompt_tokens: int, completion_tokens: int) -> None:
        """One request of a key, whatever became of it. ``key`` is a name from the settings, never a client's."""
        self.key_requests.labels(key).inc()
        self.key_tokens.labels(key, "prompt").inc(prompt_tokens)
        self.key_tokens.labels(key, "completion").inc(completion_tokens)


# What an engine says of itself (``statistics``), by its key there: the metric's name and meaning. Those that end in
# ``_total`` only grow, within the life of one engine.
ENGINE_FIGURES: Mapping[str, tuple[str, str]] = {
    "waiting": ("waiting", "Sequences that wait for a row"),
    "prefilling": ("prefilling", "Sequences whose prompt is being computed"),
    "decoding": ("decoding", "Sequences that decode"),
    "groups": ("groups", "Groups that decode, each as one batch"),
    "in_flight": ("microbatches_in_flight", "Microbatches in the pipeline"),
    "preemptions": ("preemptions_total", "Rows that gave up their memory and were computed again later"),
    "prefilled_tokens": ("prefilled_tokens_total", "Positions of prompts computed, and of what was resumed"),
    "kv_bytes": ("kv_bytes", "What the rows' keys and values take on the stage that is fullest"),
    "kv_budget_bytes": ("kv_budget_bytes", "What that stage has for them; 0 is no bound"),
    "tokens": ("tokens_total", "Tokens drawn"),
    "verified_blocks": ("verified_blocks_total", "Steps that tried a draft"),
    "drafted_tokens": ("drafted_tokens_total", "Tokens that were drafted and tried"),
    "accepted_tokens": ("accepted_tokens_total", "Drafted tokens that came true"),
    "draft_model_ready": ("draft_model_ready", "Whether the process of the draft model answers"),
    "prefix_entries": ("prefix_entries", "Entries of the prefix cache"),
    "prefix_bytes": ("prefix_bytes", "What they take on the stage where they take the most"),
    "prefix_disk_entries": ("prefix_disk_entries", "Entries of the prefix cache that are on the stages' disks only"),
    "prefix_disk_hits": ("prefix_disk_hits_total", "Rows that began with an entry read from the disks"),
    "prefix_hits": ("prefix_hits_total", "Rows that began with an entry of the prefix cache"),
    "prefix_hit_tokens": ("prefix_hit_tokens_total", "Positions that were not computed again thanks to it"),
    "prefix_evictions": ("prefix_evictions_total", "Entries that went for room or by age"),
    "prefix_fallbacks": ("prefix_fallbacks_total", "Rows computed again because a stage did not have their entry"),
    "shared": ("shared_total", "Requests that joined an identical one instead of being computed"),
    "generations_held": ("generations_held", "Generations with an Idempotency-Key, attached to or not"),
    "held_bytes": ("held_bytes", "What they take"),
    "attached_again": ("attached_again_total", "Requests that attached to a generation instead of beginning it"),
    "response_cache_entries": ("response_cache_entries", "Answers of deterministic requests kept in memory"),
    "response_cache_bytes": ("response_cache_bytes", "What they take in memory"),
    "response_cache_file_entries": ("response_cache_file_entries", "Answers kept in the node's file, of all models"),
    "response_cache_hits": ("response_cache_hits_total", "Requests answered from kept answers"),
    "response_cache_misses": ("response_cache_misses_total", "Deterministic requests that had to be computed"),
    "response_cache_evictions": ("response_cache_evictions_total", "Kept answers that went for room in memory"),
}

# The same for lists with a figure for each stage.
STAGE_FIGURES: Mapping[str, tuple[str, str]] = {
    "busy_seconds": ("busy_seconds", "Seconds that a stage computed"),
    "sent_bytes": ("sent_bytes", "Bytes of hidden states that a stage sent to the next one"),
    "saved_bytes": ("saved_bytes", "Bytes that compression took off them"),
}

EngineStatistics = Callable[[], Mapping[tuple[str, str], Mapping[str, Any]]]


class EngineCollector(Collector):
    """Reads the engines of this node when it is asked; ``statistics`` gives them by (model, pipeline)."""

    def __init__(self, statistics: EngineStatistics) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        engines = self._statistics()
        for key, (name, meaning) in ENGINE_FIGURES.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"mlx_cluster_engine_{name.removesuffix('_total')}", meaning, labels=["model", "pipeline"])
            for names, figures in engines.items():
                if key in figures:
                    family.add_metric(names, figures[key])
            yield family
        for key, (name, meaning) in STAGE_FIGURES.items():
            each = CounterMetricFamily(
                f"mlx_cluster_engine_stage_{name}", meaning, labels=["model", "pipeline", "stage"]
            )
            for names, figures in engines.items():
                for stage, value in enumerate(figures.get(key, ())):
                    each.add_metric([*names, str(stage)], value)
            yield each


class ClusterMetrics:
    """What an agent counts of its cluster."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.transitions = Counter(
            "mlx_cluster_transitions",
            "Changes of nodes, coordinator, quorum and document that this node has noticed",
            ["kind"],
            registry=registry,
        )
        self.recovery_seconds = Histogram(
            "mlx_cluster_recovery_seconds",
            "Seconds from the loss of a pipeline that this node drives until it served again",
            buckets=RECOVERY_BUCKETS,
            registry=registry,
        )
        self.term = Gauge("mlx_cluster_term", "The election term that this node is in", registry=registry)
        self.leads = Gauge("mlx_cluster_leads", "1 while this node is the coordinator", registry=registry)
        self.has_quorum = Gauge(
            "mlx_cluster_has_quorum", "1 while this node knows a coordinator that a majority follows", registry=registry
        )
        self.nodes = Gauge(
            "mlx_cluster_nodes", "Nodes in each state, as this node sees them", ["state"], registry=registry
        )


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gateway = GatewayMetrics(self.registry)
        self.cluster = ClusterMetrics(self.registry)

    def watch_engines(self, statistics: EngineStatistics) -> None:
        """Show the engines of this node, which come and go."""
        self.registry.register(EngineCollector(statistics))

    def render(self) -> bytes:
        """The text format that Prometheus reads; serve it as ``CONTENT_TYPE``."""
        return generate_latest(self.registry)
