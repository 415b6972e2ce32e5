"""What a publish changes for live traffic: shares and costs of two checkpoints on the same prompts."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration, measure_curve
from depo_gateway.estimator.records.types import Record, RoutingSettings, ServedPool
from depo_gateway.estimator.text import TextConfig
from depo_gateway.gateway import routing
from depo_gateway.gateway.routing import Eligible
from depo_gateway.training.online.publish_change import (
    UnknownChangeError,
    eligible_confidence,
    live_traffic,
    measure_change,
    route_eligible,
)
from tests.stages import uncalibrated_stage

POOLS = ("small", "large")
SERVED = {"small": ServedPool("org/small", 1.0), "large": ServedPool("org/large", 5.0)}
FIXED = RoutingSettings("gain", 0.85, {}, SERVED)


def settings(target: Mapping[str, float], rule: str = "gain") -> RoutingSettings:
    return RoutingSettings(rule, None, target, SERVED)


def record(number: int, settings: RoutingSettings | None = FIXED, **fields: object) -> Record:
    known = {
        "pool": "small", "reason": "confident", "confidence": 0.9, "threshold": 0.85, "pools": POOLS, "status": 200,
        "asked": f"prompt {number}", "prompt_tokens": 10, "completion_tokens": 10, "settings": settings,
    }  # fmt: skip
    return Record(f"r{number}", float(number), **(known | fields))  # type: ignore[arg-type]


def gains(large: float, count: int = 1000, seed: int = 0) -> Array:
    """Qualities (N, 2) of which the gain is above 0.15 on this share of the prompts."""
    high = np.arange(count) < round(large * count)
    order = np.random.default_rng(seed).permutation(count)
    gain = np.where(high, 0.4, 0.05) + np.linspace(0, 0.01, count)
    return np.stack([np.full(count, 0.5), 0.5 + gain], 1)[order]


def calibration(quality: Array) -> Calibration:
    stage = uncalibrated_stage(quality.shape[1])
    curves = {rule: measure_curve(quality, quality, np.ones(len(quality)), rule) for rule in ("gain", "difficulty")}
    return Calibration(POOLS, {"full": stage, "cheap": stage}, curves)


def change(before: Array, after: Array, **fields: object):  # type: ignore[no-untyped-def]
    traffic = live_traffic([record(n, **fields) for n in range(len(after))], POOLS)  # type: ignore[arg-type]
    return measure_change(traffic, (before, calibration(before)), (after, calibration(after)))


def test_a_fixed_threshold_shifts_the_share_and_the_cost() -> None:
    found = change(gains(0.03), gains(0.7))
    assert (found.before.large_share, found.after.large_share) == (0.03, 0.7)
    assert found.before.cost == pytest.approx(0.97 / 5 + 0.03)
    assert found.after.cost == pytest.approx(0.3 / 5 + 0.7)
    assert found.cost_increase == found.cost_change == pytest.approx(0.67 * 0.8)
    assert found.describe() == (
        "at threshold 0.85 (rule gain) the large share goes from 3.0% to 70.0% and the cost from 22.4% to 76.0% of"
        " all-large's, on 1000 live prompts"
    )


@pytest.mark.parametrize("target", [{"large_share": 0.2}, {"cost": 0.36}])
@pytest.mark.parametrize("rule", ["gain", "difficulty"])
def test_a_target_of_share_or_cost_keeps_them(target: dict[str, float], rule: str) -> None:
    chance = np.random.default_rng(1)
    before, after = gains(0.03), np.stack([chance.uniform(size=1000), np.ones(1000)], 1)
    found = change(before, after, settings=settings(target, rule))
    if rule == "gain":
        assert found.before.large_share == pytest.approx(0.2, abs=0.01)
    assert found.after.large_share == pytest.approx(0.2, abs=0.01)
    assert found.after.cost == pytest.approx(0.36, abs=0.01)
    assert found.describe().startswith(f"with routing.target {'='.join(map(str, *target.items()))} (threshold ")


def test_equal_confidences_meet_a_target_too_because_the_controller_alternates() -> None:
    """An estimator that knows nothing yet is no cheaper under a target than one that does."""
    found = change(np.full((1000, 2), 0.5), gains(0.7), settings=settings({"large_share": 0.3}))
    assert found.before.large_share == pytest.approx(0.3)
    assert found.before.cost == pytest.approx(0.2 + 0.3 * 0.8)
    assert abs(found.cost_increase) < 0.01
    unreachable = change(np.full((1000, 2), 0.5), gains(0.7), settings=settings({"cost": 0.1}))  # all-small costs 0.2
    assert (unreachable.before.large_share, unreachable.after.large_share) == (0.0, 0.0)


def test_a_target_of_quality_moves_with_the_calibration() -> None:
    before, after = gains(0.03), gains(0.7)
    found = change(before, after, settings=settings({"quality": 0.9}))
    assert found.before.threshold == calibration(before).threshold("gain", quality=0.9)
    assert found.after.threshold == calibration(after).threshold("gain", quality=0.9)
    assert found.share_change > 0.4
    without = replace(calibration(after), curves={})
    traffic = live_traffic([record(n, settings({"quality": 0.9})) for n in range(1000)], POOLS)
    with pytest.raises(UnknownChangeError, match=r"routing\.target quality 0\.9 has no threshold"):
        measure_change(traffic, None, (after, without))


def test_tokens_weigh_the_cost() -> None:
    records = [record(n, prompt_tokens=100 if n < 10 else 0, completion_tokens=0) for n in range(100)]
    before, after = np.tile([0.9, 0.9], (100, 1)), np.tile([0.9, 0.9], (100, 1))
    after[:10, 0] = 0.1
    found = measure_change(live_traffic(records, POOLS), (before, calibration(before)), (after, calibration(after)))
    assert found.share_change == pytest.approx(0.1)
    assert found.cost_change == pytest.approx(0.8)


def test_costs_come_from_the_records_or_else_from_the_learner_and_else_the_share_bounds_the_increase() -> None:
    unnamed = [record(n, None) for n in range(1000)]
    before, after = gains(0.03), gains(0.7)
    both = (before, calibration(before)), (after, calibration(after))
    known = measure_change(live_traffic(unnamed, POOLS, {"small": 2.0, "large": 4.0}), *both)
    assert known.cost_change == pytest.approx(0.67 / 2)
    for costs in (None, {"small": 1.0}, {"small": 0.0, "large": 0.0}):
        unknown = measure_change(live_traffic(unnamed, POOLS, costs), *both)
        assert unknown.cost_change is None
        assert unknown.cost_increase == pytest.approx(0.67)
        assert unknown.describe().endswith("to 70.0%; the pools' costs are unknown, on 1000 live prompts")


def test_without_a_champion_what_served_counts_but_not_what_was_drawn_at_random() -> None:
    served = [record(n, pool="large" if n < 30 else "small") for n in range(1000)]
    drawn = [record(1000 + n, pool="large", reason="explore") for n in range(200)]
    traffic = live_traffic([*drawn, *served], POOLS)
    after = gains(0.7)
    found = measure_change(traffic, None, (after, calibration(after)))
    assert found.before.large_share == pytest.approx(0.03)


@pytest.mark.parametrize("target", [{}, {"large_share": 0.3}])
def test_prompts_that_the_served_checkpoint_did_not_know_count_as_they_were_served(target: dict[str, float]) -> None:
    """Its scores would send all of them to the large pool, but chance sent a tenth there."""
    kind = settings(target) if target else FIXED
    strange = [
        record(n, kind, reason="unfamiliar", pool="small" if n % 10 else "large", propensity=0.9 if n % 10 else 0.1)
        for n in range(1000)
    ]
    traffic = live_traffic(strange, POOLS)
    before, after = gains(1.0), gains(0.7)
    found = measure_change(traffic, (before, calibration(before)), (after, calibration(after)))
    assert found.before.large_share == pytest.approx(0.1)
    assert found.after.large_share == pytest.approx(0.3 if target else 0.7, abs=0.01)
    half = [replace(item, reason="confident" if n % 2 else "unfamiliar") for n, item in enumerate(strange)]
    found = measure_change(live_traffic(half, POOLS), (before, calibration(before)), (after, calibration(after)))
    assert found.before.large_share == pytest.approx(0.3 if target else 0.6, abs=0.01)


def test_only_the_newest_routed_prompts_with_their_text_count() -> None:
    odd = [
        record(9000, reason="pinned", threshold=None),
        record(9001, asked=None),
        record(9002, reason="sticky"),
        record(9003, pool="other", pools=("other", "large")),
    ]
    traffic = live_traffic([*(record(n) for n in range(1500)), *odd], POOLS)
    assert [item.id for item in traffic.prompts] == [f"r{n}" for n in range(500, 1500)]
    assert traffic.examples(TextConfig())[0].prompt == "prompt 500"
    with pytest.raises(UnknownChangeError, match="no recent record was routed by a threshold"):
        live_traffic(odd[:1], POOLS)
    with pytest.raises(UnknownChangeError, match="no recent routed record has its text and these pools"):
        live_traffic(odd[1:2], POOLS)


@pytest.mark.parametrize("rule", ["gain", "difficulty"])
def test_prompts_go_where_the_gateway_sends_them(rule: str) -> None:
    chance = np.random.default_rng(0)
    pools = ("a", "b", "c")
    quality, eligible = chance.uniform(size=(500, 3)), chance.uniform(size=(500, 3)) < 0.7
    eligible[~eligible.any(1), 2] = True
    confidence = eligible_confidence(quality, eligible, rule)
    for threshold in (0.0, 0.5, 0.85, 1.0):
        chosen = route_eligible(confidence, eligible, threshold)
        for row in range(500):
            candidates = Eligible(tuple(name for name, can in zip(pools, eligible[row], strict=True) if can))
            known = routing.confidences(dict(zip(pools, quality[row], strict=True)), rule, candidates)  # type: ignore[arg-type]
            decision = routing.by_threshold(known, candidates, threshold, "")
            assert pools[chosen[row]] == decision.pool


def test_prompts_are_scored_with_the_group_that_they_were_served_with() -> None:
    traffic = live_traffic([record(0, group="proofs"), record(1)], POOLS)
    assert [example.task for example in traffic.examples(TextConfig())] == ["proofs", ""]
