"""The gateway's state for /admin/status, /readyz and the page at /admin/, without prompts, answers or keys."""

import base64
import hashlib
import re
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from depo_gateway import __version__
from depo_gateway.estimator import held_publish
from depo_gateway.estimator.calibration import Curve
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.pools import Pool
from depo_gateway.gateway.recent_requests import SLICE_SECONDS, EndedRequest, RecentRequests, TimeSlice
from depo_gateway.gateway.state import Gateway
from depo_gateway.gateway.thresholds import curve_of

PAGE = Path(__file__).with_name("status.html")
PRIVATE = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
CIRCUITS = ("closed", "half open", "open")


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The status page and its headers. Only the page's own style and script may run in it."""
    text = PAGE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "style-src": _hashed(text, "style"),
        "script-src": _hashed(text, "script"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        **PRIVATE,
    }


def unready(gateway: Gateway) -> list[str]:
    """Why the gateway is not ready for requests; empty when it is."""
    reasons = []
    if gateway.draining:
        reasons.append("draining: the process was asked to stop")
    if not any(pool.usable() for pool in gateway.live.pools.values()):
        reasons.append("no pool has a usable backend")
    return reasons


def describe(gateway: Gateway) -> dict[str, Any]:
    """The body of /admin/status."""
    live, now, reasons = gateway.live, time.time(), unready(gateway)
    recorder = gateway.recorder
    return {
        "version": __version__,
        "host": socket.gethostname(),
        "started": gateway.recent.started,
        "time": now,
        "ready": not reasons,
        "reasons": reasons,
        "estimator": live.scorer.version,
        "rule": live.config.routing.rule,
        **gateway.control.describe(),
        "publish": _publish(gateway),
        "shares": {name: round(share, 4) for name, share in gateway.shares.items()},
        "active_requests": gateway.active,
        "conversations": len(gateway.conversations),
        "records": None
        if recorder is None
        else {
            "database": recorder.store.name,
            "prompts": recorder.settings.prompts,
            "waiting": recorder.waiting,
            "trouble": recorder.trouble,
        },
        "order": list(live.pools),  # cheapest first; a JSON object has none
        "pools": {name: _pool(pool) for name, pool in live.pools.items()},
        "since_start": _since_start(gateway),
        "lately": _lately(gateway.recent, now),
        "curve": _curve(gateway),
        "recent": [_ended(ended) for ended in gateway.recent.decisions()],
    }


def _publish(gateway: Gateway) -> dict[str, Any]:
    """What publishing the checkpoint in service changed, and what the learner holds back."""
    change = held_publish.published_change(gateway.live.scorer.runtime.manifest)
    return {
        "share_change": None if change is None else round(change.share, 4),
        "cost_change": None if change is None or change.cost is None else round(change.cost, 4),
        "held": None if gateway.held is None else gateway.held.sentence,
    }


def _pool(pool: Pool) -> dict[str, Any]:
    return {
        "model": pool.config.model,
        "cost": pool.config.cost,
        "in_flight": pool.in_flight,
        "max_in_flight": pool.config.max_in_flight,
        "waiting": len(pool.waiting),
        "backends": [
            {
                "url": backend.url,
                "up": backend.up,
                "circuit": CIRCUITS[backend.state],
                "in_flight": backend.in_flight,
            }
            for backend in pool.backends
        ],
    }


def _since_start(gateway: Gateway) -> dict[str, Any]:
    """The counts of /metrics."""
    metrics = gateway.metrics
    requests = _counts(metrics.requests, "code")
    decisions: dict[str, dict[str, int]] = {}
    for (pool, reason), count in _counts(metrics.decisions, "pool", "reason").items():
        decisions.setdefault(pool, {})[reason] = int(count)
    costs = {pool: round(cost, 6) for (pool,), cost in _counts(metrics.cost, "pool").items()}
    total, all_large = sum(costs.values()), sum(_counts(metrics.cost_all_large).values())
    return {
        "requests": int(sum(requests.values())),
        "failed": int(sum(count for (code,), count in requests.items() if code.startswith("5"))),
        "decisions": decisions,
        "cost": {
            "total": round(total, 6),
            "all_large": round(all_large, 6),
            "saved": round(1.0 - total / all_large, 4) if all_large > 0 else None,
            "by_pool": costs,
        },
    }


def _lately(recent: RecentRequests, now: float) -> dict[str, Any]:
    slices = recent.slices(now)
    decisions: dict[str, dict[str, int]] = {}
    for item in slices:
        for (pool, reason), count in item.decisions.items():
            reasons = decisions.setdefault(pool, {})
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "seconds": round(now - max(recent.started, slices[0].number * SLICE_SECONDS), 1),
        "requests": sum(item.requests for item in slices),
        "failed": sum(item.failed for item in slices),
        "decisions": decisions,
        "slice_seconds": SLICE_SECONDS,
        "slices": [{"time": item.number * SLICE_SECONDS, "decisions": _by_pool(item)} for item in slices],
    }


def _by_pool(item: TimeSlice) -> dict[str, int]:
    counts: dict[str, int] = {}
    for (pool, _), count in item.decisions.items():
        counts[pool] = counts.get(pool, 0) + count
    return counts


def _curve(gateway: Gateway) -> dict[str, Any] | None:
    """The loaded checkpoint's calibration curve for the config's rule; None where it has none for these pools."""
    live = gateway.live
    curve = curve_of(live.scorer.runtime, live.config)
    if curve is None:
        return None
    cost, share = relative_cost(curve, live.config), [row[-1] for row in curve.shares]
    best = None if curve.quality is None else curve.quality[-1] if curve.all_large is None else curve.all_large
    threshold = gateway.control.threshold
    at = next((index for index, value in enumerate(curve.thresholds) if value >= threshold), None)
    if at is None:  # above every confidence of the calibration's prompts: all go to the last pool
        now = {"cost": None if cost is None else 1.0, "large_share": 1.0, "quality": best}
    else:
        quality = None if curve.quality is None else curve.quality[at]
        now = {"cost": None if cost is None else cost[at], "large_share": share[at], "quality": quality}
    return {
        "thresholds": [round(value, 6) for value in curve.thresholds],
        "large_share": [round(value, 6) for value in share],
        "cost": None if cost is None else [round(value, 6) for value in cost],
        "quality": None if curve.quality is None else [round(value, 6) for value in curve.quality],
        "all_large": best,
        "now": {"threshold": round(threshold, 6), **now},
    }


def relative_cost(curve: Curve, config: Config) -> list[float] | None:
    """The cost at each threshold relative to sending everything to the last pool, if all calls are of equal length.

    None where the last pool is free.
    """
    prices = [pool.cost for pool in config.pools.values()]
    if prices[-1] <= 0:
        return None
    if len(curve.shares[0]) == 1:  # a policy's checkpoint: what is below the threshold goes to the last pool
        prices = [prices[0], prices[-1]]
        rows = [(1.0 - unsure, unsure) for (unsure,) in curve.shares]
        return [_dot(row, prices) / prices[-1] for row in rows]
    return [_dot(row, prices) / prices[-1] for row in curve.shares]


def _dot(shares: tuple[float, ...], prices: list[float]) -> float:
    return sum(share * price for share, price in zip(shares, prices, strict=True))


def _ended(ended: EndedRequest) -> dict[str, Any]:
    decision = ended.decision
    return {
        "time": round(ended.time, 3),
        "id": ended.id,
        "endpoint": ended.endpoint,
        "pool": decision.pool,
        "reason": decision.reason,
        "confidence": None if decision.confidence is None else round(decision.confidence, 4),
        "threshold": None if decision.threshold is None else round(decision.threshold, 4),
        "answered": ended.answered,
        "status": ended.status,
        "seconds": round(ended.seconds, 4),
    }


def _counts(counter: Counter, *labels: str) -> dict[tuple[str, ...], float]:
    """A counter's values by the labels named, summed over the others."""
    counts: dict[tuple[str, ...], float] = {}
    for sample in next(iter(counter.collect())).samples:
        if sample.name.endswith("_total"):
            name = tuple(sample.labels[label] for label in labels)
            counts[name] = counts.get(name, 0.0) + sample.value
    return counts


def _hashed(text: str, element: str) -> str:
    """The source of the page's one inline element of that kind in a content security policy."""
    found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    assert len(found) == 1, f"{PAGE} has {len(found)} {element} elements"
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
