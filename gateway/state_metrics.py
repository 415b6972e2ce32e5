"""Gauges of the gateway's state: set from it whenever /metrics is scraped."""

import math

from prometheus_client import Gauge

from depo_gateway.estimator import held_publish
from depo_gateway.gateway.control import Control
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.state import Gateway


def show_state(gateway: Gateway) -> None:
    """Brings the gauges of `Control` and of the loaded checkpoints up to date."""
    show_control(gateway.control, gateway.metrics)
    _show_version(gateway.metrics.estimator_info, gateway.live.scorer.version)
    change = held_publish.published_change(gateway.live.scorer.runtime.manifest)
    gateway.metrics.publish_share_change.set(math.nan if change is None else change.share)
    gateway.metrics.publish_cost_change.set(math.nan if change is None or change.cost is None else change.cost)
    candidate = gateway.control.candidate
    _show_version(gateway.metrics.candidate_info, None if candidate is None else candidate.version)


def show_control(control: Control, metrics: Metrics) -> None:
    metrics.threshold.set(control.threshold)
    metrics.target_share.set(control.target_share)
    metrics.target_wanted.set(control.target_wanted)
    metrics.score_drift.set(control.score_drift)
    metrics.router_floor.set(control.routes_by_share)
    metrics.key_large_share_left.clear()  # of keys that a reload removed
    for name, calls in control.budgets_left().items():
        metrics.key_large_share_left.labels(name).set(calls)


def _show_version(gauge: Gauge, version: str | None) -> None:
    gauge.clear()
    if version is not None:
        gauge.labels(version).set(1)
