"""Every Prometheus metric of the gateway, declared once. Labels come from closed sets only."""

import math
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
CONFIDENCE = tuple(step / 20 for step in range(1, 21))
NONE = "none"  # the label of a request that never reached a pool


class Metrics:
    """One gateway's metrics on its own registry, so that two gateways in one process don't add up."""

    def __init__(self, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests_total", "Requests, by how they ended", ["endpoint", "pool", "code"], registry=registry
        )
        self.request_duration = Histogram(
            "gateway_request_duration_seconds",
            "From the request's first byte to the answer's last byte",
            ["endpoint", "pool"],
            buckets=LATENCY,
            registry=registry,
        )
        self.overhead = Histogram(
            "gateway_overhead_seconds",
            "From the complete request to its departure for a backend, without queueing",
            ["endpoint"],
            buckets=OVERHEAD,
            registry=registry,
        )
        self.first_token = Histogram(
            "gateway_time_to_first_token_seconds",
            "From the complete request to a stream's first byte",
            ["pool"],
            buckets=LATENCY,
            registry=registry,
        )
        self.tokens = Counter(
            "gateway_tokens_total", "Tokens, as counted by the backends", ["pool", "type"], registry=registry
        )
        self.cost = Counter("gateway_cost_total", "Cost, in the unit of pools.*.cost", ["pool"], registry=registry)
        self.cost_all_large = Counter(
            "gateway_cost_all_large_total",
            "What the same tokens would cost in the most expensive pool",
            registry=registry,
        )
        self.in_flight = Gauge(
            "gateway_in_flight_requests", "Requests that hold a slot of a pool", ["pool"], registry=registry
        )
        self.queue_wait = Histogram(
            "gateway_queue_wait_seconds",
            "Wait for a pool's slot",
            ["pool"],
            buckets=(*OVERHEAD, 5.0),
            registry=registry,
        )
        self.disconnects = Counter(
            "gateway_client_disconnects_total",
            "Clients that disconnected before the end of their answer",
            ["phase"],
            registry=registry,
        )
        self.attempts = Counter(
            "gateway_upstream_attempts_total", "Attempts at a backend", ["backend", "outcome"], registry=registry
        )
        self.retries = Counter("gateway_retries_total", "Second attempts", ["reason"], registry=registry)
        self.fallbacks = Counter(
            "gateway_fallbacks_total",
            "Requests that another pool than the chosen one served",
            ["from_pool", "to_pool", "reason"],
            registry=registry,
        )
        self.backend_up = Gauge("gateway_backend_up", "1 while its health checks pass", ["backend"], registry=registry)
        self.circuit = Gauge("gateway_circuit_state", "0 closed, 1 half open, 2 open", ["backend"], registry=registry)
        self.decisions = Counter("gateway_decisions_total", "Decisions", ["pool", "reason"], registry=registry)
        self.unfamiliar = Counter(
            "gateway_unfamiliar_total",
            "Decisions for prompts unlike those that the estimator was fitted on",
            ["pool"],
            registry=registry,
        )
        self.confidence = Histogram(
            "gateway_confidence", "Confidence in the cheapest eligible pool", buckets=CONFIDENCE, registry=registry
        )
        self.threshold = Gauge("gateway_threshold", "Threshold in force", registry=registry)
        self.estimator_duration = Histogram(
            "gateway_estimator_duration_seconds",
            "Time to score a prompt, waiting included",
            ["stage"],
            buckets=OVERHEAD,
            registry=registry,
        )
        self.estimator_outcomes = Counter(
            "gateway_estimator_outcomes_total", "How prompts were scored", ["outcome"], registry=registry
        )
        self.estimator_truncated = Counter(
            "gateway_estimator_truncated_total", "Prompts truncated to head and tail before scoring", registry=registry
        )
        self.estimator_info = Gauge("gateway_estimator_info", "The loaded checkpoint", ["version"], registry=registry)
        self.estimator_loads = Counter(
            "gateway_estimator_loads_total", "New checkpoints found while running", ["result"], registry=registry
        )
        self.target_share = Gauge(
            "gateway_target_share",
            "The share that routing.target bounds, over the last 2,000 routed requests",
            registry=registry,
        )
        self.target_wanted = Gauge(
            "gateway_target_wanted", "The bound of routing.target on gateway_target_share", registry=registry
        )
        self.score_drift = Gauge(
            "gateway_score_drift", "Distance between live confidences and the calibration's", registry=registry
        )
        self.publish_share_change = Gauge(
            "gateway_publish_share_change",
            "By how much publishing the checkpoint in service changed the large share, as the learner measured it",
            registry=registry,
        )
        self.publish_cost_change = Gauge(
            "gateway_publish_cost_change",
            "By how much publishing the checkpoint in service changed the cost, relative to all-large's",
            registry=registry,
        )
        self.router_floor = Gauge(
            "gateway_router_floor",
            "1 while requests are routed at random by share instead of by scores",
            registry=registry,
        )
        self.key_large_share_left = Gauge(
            "gateway_key_large_share_left",
            "Calls of the last pool that a key with a large_share has saved up, at most 10",
            ["key"],
            registry=registry,
        )
        self.candidate_decisions = Counter(
            "gateway_candidate_decisions_total",
            "Pools that the candidate would have chosen",
            ["pool"],
            registry=registry,
        )
        self.candidate_agreement = Counter(
            "gateway_candidate_agreement_total",
            "The candidate's decisions, by agreement with the live ones",
            ["agrees"],
            registry=registry,
        )
        self.candidate_confidence = Histogram(
            "gateway_candidate_confidence",
            "The candidate's confidence in the cheapest eligible pool",
            buckets=CONFIDENCE,
            registry=registry,
        )
        self.candidate_outcomes = Counter(
            "gateway_candidate_outcomes_total", "Prompts offered to the candidate", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.candidate_loads = Counter(
            "gateway_candidate_loads_total", "New checkpoints of the candidate", ["result"], registry=registry
        )
        self.candidate_info = Gauge("gateway_candidate_info", "The loaded candidate", ["version"], registry=registry)
        for gauge in (
            *(self.target_share, self.target_wanted, self.score_drift),
            *(self.publish_share_change, self.publish_cost_change),
        ):
            gauge.set(math.nan)
        self.records = Counter("gateway_records_total", "Records of finished requests", ["outcome"], registry=registry)
        self.records_waiting = Gauge("gateway_records_waiting", "Records not yet in the database", registry=registry)
        self.records_failures = Counter(
            "gateway_records_failures_total", "Failed attempts to write to the records database", registry=registry
        )
        self.feedback = Counter("gateway_feedback_total", "Calls of /v1/feedback", ["outcome"], registry=registry)
        self.config_reloads = Counter("gateway_config_reloads_total", "Config reloads", ["result"], registry=registry)
        Gauge("gateway_build_info", "Build", ["version"], registry=registry).labels(version).set(1)
        # Present at 0 from the start: Prometheus sees no increase in a counter that appears with its first event.
        for counter, results in (
            (self.config_reloads, ("applied", "refused")),
            (self.estimator_loads, ("applied", "refused")),
            (self.candidate_loads, ("applied", "refused")),
            (self.records, ("written", "dropped", "rejected")),
        ):
            for result in results:
                counter.labels(result)
        # A request touches a dozen children, and prometheus_client takes a lock to look one up. These metrics are never
        # cleared, so their children can be cached.
        for metric in vars(self).values():
            if isinstance(metric, (Counter, Histogram)) or metric is self.in_flight:
                vars(metric)["labels"] = cache(metric.labels)
