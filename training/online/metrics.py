"""Every Prometheus metric of the learner, declared once, and the small server of /metrics and /livez."""

import math
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from depo_gateway.estimator.held_publish import HeldPublish
from depo_gateway.training.judging.order_effects import Grades, order_effect
from depo_gateway.training.online.spend_ledger import Spent

STALE_SECONDS = 180.0  # a loop without a heartbeat for so long counts as dead


class LearnerMetrics:
    """The metrics of one learner, on their own registry. Label values come from closed sets only."""

    def __init__(self, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.labels = Counter("learner_labels_total", "Labels written to the database", ["source"], registry=registry)
        self.shadowed = Counter(
            "learner_shadowed_records_total", "Records that shadowing has finished with", ["outcome"], registry=registry
        )
        self.shadow_requests = Counter(
            "learner_shadow_requests_total", "Calls to pools", ["pool", "outcome"], registry=registry
        )
        self.shadow_cost = Counter(
            "learner_shadow_cost_total", "Cost of the calls to pools, in the unit of pools.*.cost", registry=registry
        )
        self.shadow_tokens = Counter(
            "learner_shadow_tokens_total", "Tokens of the calls to pools, the judge's among them", registry=registry
        )
        self.spent_today = Gauge(
            "learner_spent_today",
            "Spending of shadowing and judging since midnight UTC, also by learners before this one",
            ["unit"],
            registry=registry,
        )
        self.shadow_paused = Gauge(
            "learner_shadow_paused", "1 while shadowing is paused for this reason", ["reason"], registry=registry
        )
        self.priority_refused = Gauge(
            "learner_priority_refused",
            "1 once a backend of the pool has refused the field priority",
            ["pool"],
            registry=registry,
        )
        self.verdicts = Counter(
            "learner_verdicts_total",
            "Records judged, by whether the judge had a verdict",
            ["outcome"],
            registry=registry,
        )
        self.comparisons = Counter(
            "learner_comparisons_total",
            "Pairs of answers that a judging model graded in both orders, by the position that decided its verdict",
            ["favoured"],
            registry=registry,
        )
        self.refreshes = Counter(
            "learner_refreshes_total", "Refreshes, by their result", ["verdict"], registry=registry
        )
        self.refresh_duration = Histogram(
            "learner_refresh_duration_seconds",
            "Duration of a refresh, from its start to its verdict",
            buckets=(5, 15, 30, 60, 120, 300, 600, 1200, 3600, 7200),
            registry=registry,
        )
        self.calibration_error = Gauge(
            "learner_calibration_error",
            "Calibration error of the newest refresh's candidate",
            ["of"],
            registry=registry,
        )
        self.labels_seen = Gauge(
            "learner_labels_seen", "Labelled records that the newest refresh read", registry=registry
        )
        self.advantage = Gauge(
            "learner_advantage",
            "Mean quality of the router minus that of random routing at equal shares, on the newest labels",
            registry=registry,
        )
        self.advantage.set(math.nan)  # 0 would mean that the router is no better than random routing
        self.last_publish = Gauge(
            "learner_last_publish_timestamp_seconds", "When this learner last published", registry=registry
        )
        self.publish_held = Gauge(
            "learner_publish_held",
            "1 while a checkpoint is held back because it would raise the cost",
            registry=registry,
        )
        self.publish_held_share_change = Gauge(
            "learner_publish_held_share_change",
            "By how much the held checkpoint would change the large share",
            registry=registry,
        )
        self.publish_held_cost_change = Gauge(
            "learner_publish_held_cost_change",
            "By how much the held checkpoint would change the cost, relative to all-large's",
            registry=registry,
        )
        self.show_held(None)
        self.errors = Counter(
            "learner_errors_total", "Failures after which the learner tries again", ["part"], registry=registry
        )
        # These start at 0: Prometheus sees no increase of a counter that appears with its first event.
        for verdict in ("published", "held", "refused", "failed"):
            self.refreshes.labels(verdict)
        for position in ("none", "first", "second"):
            self.comparisons.labels(position)
        for part in ("records", "shadow", "refresh", "disk"):
            self.errors.labels(part)
        self.info = Gauge("learner_info", "The checkpoint that `current` names", ["version"], registry=registry)
        Gauge("learner_build_info", "Build", ["version"], registry=registry).labels(version).set(1)

    def show_spending(self, tokens: int, today: Spent) -> None:
        """Adds the tokens of finished calls, and shows what the day has cost."""
        self.shadow_tokens.inc(tokens)
        for unit, spent in (("records", today.records), ("tokens", today.tokens), ("cost", today.cost)):
            self.spent_today.labels(unit).set(spent)

    def show_held(self, held: HeldPublish | None) -> None:
        """Sets the gauges of the checkpoint that is held back; NaN without one."""
        self.publish_held.set(held is not None)
        self.publish_held_share_change.set(math.nan if held is None else held.share_change)
        self.publish_held_cost_change.set(math.nan if held is None or held.cost_change is None else held.cost_change)

    def count_verdict(self, outcome: str) -> None:
        self.verdicts.labels(outcome).inc()

    def count_call(self, pool: str, outcome: str) -> None:
        self.shadow_requests.labels(pool, outcome).inc()

    def add_cost(self, cost: float) -> None:
        self.shadow_cost.inc(cost)

    def count_comparison(self, straight: Grades, swapped: Grades) -> None:
        self.comparisons.labels(order_effect(straight, swapped)).inc()

    def report_refused_priority(self, pool: str) -> None:
        self.priority_refused.labels(pool).set(1)


class Heartbeats:
    """Heartbeats of the learner's loops. Any thread may read them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beats: dict[str, float] = {}

    def beat(self, loop: str) -> None:
        self._beats[loop] = self._clock()

    def stale(self) -> list[str]:
        """The loops without a recent heartbeat."""
        now = self._clock()
        return sorted(loop for loop, beat in list(self._beats.items()) if now - beat > STALE_SECONDS)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...  # probes would flood the log


class MetricsServer:
    """`with MetricsServer(host, port, metrics, heartbeats) as server`: serves /metrics and /livez from a thread.

    Raises ValueError where the address is in use or not one of this machine.
    """

    def __init__(self, host: str, port: int, metrics: LearnerMetrics, heartbeats: Heartbeats) -> None:
        metrics_app = make_wsgi_app(metrics.registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ["PATH_INFO"] == "/metrics":
                page: Iterable[bytes] = metrics_app(environ, start_response)
                return page
            if environ["PATH_INFO"] != "/livez":
                return _plain(start_response, "404 Not Found", "the paths are /metrics and /livez")
            stale = heartbeats.stale()
            if stale:
                return _plain(start_response, "503 Service Unavailable", f"no heartbeat from: {', '.join(stale)}")
            return _plain(start_response, "200 OK", "ok")

        try:
            self._server = make_server(host, port, app, _Server, _Handler)
        except OSError as error:
            raise ValueError(f"listen: can't listen on {host}:{port}: {error.strerror}") from None
        self.port: int = self._server.server_port

    def __enter__(self) -> "MetricsServer":
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _plain(start_response: Callable[..., Any], status: str, text: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode() + b"\n"]
