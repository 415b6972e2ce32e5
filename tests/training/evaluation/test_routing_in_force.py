"""What the records say of how the gateways route now."""

from dataclasses import replace

import pytest

from depo_gateway.estimator.records.types import Record, RoutingSettings, ServedPool
from depo_gateway.training.evaluation.routing_in_force import (
    UNKNOWN_MODEL,
    live_large_share,
    routing_in_force,
    served_models,
    threshold_periods,
)

POOLS = {"small": ServedPool("org/small", 1.0), "large": ServedPool("org/large", 5.0)}
FIXED = RoutingSettings("gain", 0.85, {}, POOLS)
TARGET = RoutingSettings("difficulty", None, {"large_share": 0.3}, POOLS)
OTHER_MODEL = replace(FIXED, pools=POOLS | {"small": ServedPool("org/tiny", 1.0)})


def record(number: int, settings: RoutingSettings | None, threshold: float = 0.85, pool: str = "small") -> Record:
    reason = "confident" if pool == "small" else "unsure"
    return Record(
        f"r{number}", float(number), pool=pool, reason=reason, confidence=0.9, threshold=threshold, status=200,
        pools=("small", "large"), quality={"small": 0.6, "large": 0.7}, settings=settings,
    )  # fmt: skip


def test_a_fixed_threshold_is_the_gateways_not_that_of_a_client_who_asked_for_another() -> None:
    found = routing_in_force([record(n, FIXED, 0.2 if n % 2 else 0.85) for n in range(9)])
    assert found is not None
    assert (found.rule, found.threshold, found.target) == ("gain", 0.85, None)
    assert found.costs == {"small": 1.0, "large": 5.0}
    assert found.describe() == "the rule gain at threshold 0.85"
    assert found.source == "the gateway's settings on 9 of the newest 9 routed records"


def test_the_newest_settings_count_once_most_of_the_newest_requests_have_them() -> None:
    before = [record(n, FIXED) for n in range(500)]
    after = [record(500 + n, TARGET, 0.5 + n / 1000) for n in range(61)]
    assert (early := routing_in_force([*before, *after[:40]])) is not None
    assert early.target is None
    assert (late := routing_in_force([*before, *after])) is not None
    assert late.target == ("large_share", 0.3)
    assert late.threshold == pytest.approx(0.53)  # the median
    assert (late.requests, late.agreeing) == (100, 61)
    assert late.describe() == "the rule difficulty with routing.target large_share 0.3 (threshold now 0.53)"


def test_pinned_kept_and_broken_requests_say_nothing() -> None:
    odd = [replace(record(n, FIXED), reason=reason) for n, reason in enumerate(("pinned", "sticky", "fallback", ""))]
    assert routing_in_force(odd) is None
    assert live_large_share(odd, "large") is None


def test_unfamiliar_prompts_tell_the_settings_too_and_count_as_they_were_served() -> None:
    drawn = [replace(record(n, FIXED, pool="large" if n % 4 else "small"), reason="unfamiliar") for n in range(40)]
    found = routing_in_force(drawn)
    assert found is not None
    assert (found.rule, found.threshold, found.requests) == ("gain", 0.85, 40)
    assert live_large_share(drawn, "large") == 0.75


def test_of_version_0_1_the_rule_follows_from_the_scores_and_the_target_from_thresholds_that_vary() -> None:
    fixed = routing_in_force([replace(record(n, None), confidence=0.6) for n in range(20)])
    assert fixed is not None
    assert (fixed.rule, fixed.threshold, fixed.target, fixed.costs) == ("difficulty", 0.85, None, None)
    moving = routing_in_force([record(n, None, n / 100, "large" if n % 4 == 0 else "small") for n in range(40)])
    assert moving is not None
    assert moving.rule == "gain"
    assert moving.target == ("large_share", 0.25)
    assert "vary" in moving.source


def test_the_models_that_served_are_counted_by_pool() -> None:
    records = [*(record(n, FIXED) for n in range(3)), *(record(n, OTHER_MODEL) for n in range(5)), record(9, None)]
    records += [record(10, FIXED, pool="large"), replace(record(11, FIXED), status=502)]
    assert served_models(records, ("small", "large")) == {
        "small": {"org/tiny": 5, "org/small": 3, UNKNOWN_MODEL: 1},
        "large": {"org/large": 1},
    }


def test_periods_of_thresholds_and_targets() -> None:
    records = [record(n, FIXED) for n in range(4)]
    records += [record(4 + n, TARGET, 0.4 + n / 10) for n in range(3)]
    records += [record(7, replace(FIXED, threshold=0.9), 0.9)]
    first, second, third = threshold_periods(records)
    assert (first.since, first.until, first.requests, first.threshold, first.target) == (0.0, 3.0, 4, 0.85, None)
    assert (second.requests, second.threshold, second.target) == (3, 0.5, ("large_share", 0.3))
    assert third.threshold == 0.9


def test_the_live_share_leaves_out_what_was_drawn_at_random() -> None:
    decided = [record(n, FIXED, pool="large" if n < 3 else "small") for n in range(100)]
    explored = [replace(record(n, FIXED, pool="large"), reason="explore") for n in range(50)]
    assert live_large_share([*decided, *explored], "large") == pytest.approx(0.03)
