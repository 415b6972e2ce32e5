"""Gauges show what `Control` holds at the moment of a scrape."""

import math
from pathlib import Path
from typing import Any

import pytest

from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.standing import Standing
from depo_gateway.gateway import config
from depo_gateway.gateway.control import Accounting, Control
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.state_metrics import show_control
from tests.gateway.conftest import settings

KEYS = [{"name": name, "sha256": config.key_digest(name), "large_share": 0.5} for name in ("one", "two")]


def read(checkpoint: Path, **sections: Any) -> config.Config:
    pools = {name: {"model": name, "backends": [{"url": "http://x"}]} for name in ("small", "large")}
    return config.parse_config(settings([], [], checkpoint) | {"pools": pools} | sections)


def scraped(control: Control, metrics: Metrics) -> dict[str, float]:
    show_control(control, metrics)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {sample.name + str(sample.labels or ""): sample.value for sample in samples}


def test_a_scrape_shows_the_controls_state(tiny_checkpoint: Path) -> None:
    runtime, control, metrics = Runtime.load(tiny_checkpoint), Control(), Metrics("0")
    control.follow(read(tiny_checkpoint, routing={"threshold": 0.75}, auth={"keys": KEYS}), runtime)
    shown = scraped(control, metrics)
    assert (shown["gateway_threshold"], shown["gateway_router_floor"]) == (0.75, 0.0)
    assert math.isnan(shown["gateway_target_share"])
    assert math.isnan(shown["gateway_target_wanted"])
    assert {name for name in shown if "large_share_left" in name} == {
        "gateway_key_large_share_left{'key': 'one'}", "gateway_key_large_share_left{'key': 'two'}"
    }  # fmt: skip
    control.apply_standing(Standing(runtime.version, 1.0, 400, -0.01, -0.02, 0.0, False, 0.4))
    assert scraped(control, metrics)["gateway_router_floor"] == 1.0


def test_a_target_is_shown_and_a_key_that_a_reload_removed_is_not(tiny_checkpoint: Path) -> None:
    runtime, control, metrics = Runtime.load(tiny_checkpoint), Control(), Metrics("0")
    control.follow(read(tiny_checkpoint, auth={"keys": KEYS}), runtime)
    scraped(control, metrics)
    target = {"target": {"large_share": 0.25}}
    control.follow(read(tiny_checkpoint, routing=target, auth={"keys": KEYS[:1]}), runtime)
    both = Eligible(("small", "large"))
    control.commit(Accounting(decisive_confidence=0.5), "two", "hi", both, Decision("large", Reason.UNSURE, 0.5, 0.9))
    shown = scraped(control, metrics)
    assert (shown["gateway_target_wanted"], shown["gateway_target_share"]) == (0.25, 1.0)
    assert shown["gateway_threshold"] == pytest.approx(control.threshold)
    assert [name for name in shown if "large_share_left" in name] == ["gateway_key_large_share_left{'key': 'one'}"]
