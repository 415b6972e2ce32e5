"""The answer that a report begins with, on outcomes whose truth is known."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from depo_gateway.estimator.arrays import Array
from depo_gateway.training.evaluation.headline import (
    MAX_LOSS,
    Evidence,
    cheaper_threshold,
    difference_text,
    headline,
    kept_text,
    percent,
    points,
)
from depo_gateway.training.evaluation.reported_routing import ReportedRouting
from depo_gateway.training.evaluation.threshold_sweep import differing_outcomes, sweep_outcomes, sweep_thresholds

POOLS = ("small", "large")
ROUTING = ReportedRouting("gain", 0.85, "the gateway's default", (1.0, 5.0))


def outcomes(count: int, seed: int = 0, knows: bool = True, gap: float = 1.0) -> tuple[Array, Array]:
    """Predicted and observed quality (N, 2): the small pool fails more on prompts that a score marks, if it `knows`."""
    chance = np.random.default_rng(seed)
    hard = chance.uniform(size=count)
    truth = np.stack([0.95 - 0.6 * hard * gap, np.full(count, 0.95)], 1)
    shown = hard if knows else chance.permutation(hard)
    predicted = np.stack([0.95 - 0.6 * shown, np.full(count, 0.95)], 1)
    return predicted, (chance.uniform(size=truth.shape) < truth).astype(float)


def answer(predicted: Array, observed: Array, routing: ReportedRouting = ROUTING, **more: Any) -> dict[str, Any]:
    at = sweep_thresholds(predicted, routing.rule, [routing.threshold])
    units = more.pop("units", np.arange(len(observed)))
    length = np.random.default_rng(9).integers(10, 99, len(observed)).astype(float)
    sweep = sweep_outcomes(observed, predicted, length, routing.rule, at, units, routing.costs)
    differing = differing_outcomes(observed, predicted, routing.rule, routing.threshold)
    evidence = Evidence(sweep, len(observed), differing=differing, **more)
    return headline(evidence, routing, predicted, np.ones(len(observed)), POOLS)


def test_the_sentence_says_share_cost_and_quality_of_the_figures() -> None:
    predicted, observed = outcomes(3000)
    found = answer(predicted, observed)
    row = found["in_force"]
    sent = predicted[:, 1] - predicted[:, 0] > 0.15
    assert row["large_share"] == pytest.approx(sent.mean())
    assert row["cost"] == pytest.approx(0.2 + 0.8 * sent.mean())
    kept = np.where(sent, observed[:, 1], observed[:, 0]).mean() / observed[:, 1].mean()
    assert row["kept_quality"]["value"] == pytest.approx(kept)
    assert row["kept_quality"]["low"] < kept < row["kept_quality"]["high"]
    assert found["sentence"].startswith(
        f"At threshold 0.85 you send {percent(row['large_share'])} to large, pay {percent(row['cost'])} of all-large's"
        f" cost and keep {kept_text(row['kept_quality'])} of its quality; "
    )
    assert found["remarks"] == [
        "This routing keeps more than random routing with the same shares would:"
        f" {difference_text(row['kept_above_random'])} points."
    ]


def test_the_ratio_is_resampled_as_a_ratio() -> None:
    """Numerator and denominator share most prompts, so their ratio varies far less than either."""
    predicted, observed = outcomes(2000)
    row = answer(predicted, observed)["in_force"]
    of_ratio = row["kept_quality"]["high"] - row["kept_quality"]["low"]
    apart = (row["quality"]["high"] - row["quality"]["low"]) / observed[:, 1].mean()
    assert of_ratio < 0.9 * apart
    kept = []
    for seed in range(200):
        again = outcomes(2000, seed + 1)
        sent = again[0][:, 1] - again[0][:, 0] > 0.15
        kept.append(np.where(sent, again[1][:, 1], again[1][:, 0]).mean() / again[1][:, 1].mean())
    low, high = np.percentile(kept, [2.5, 97.5])
    assert of_ratio == pytest.approx(high - low, rel=0.25)


def test_groups_widen_the_interval() -> None:
    predicted, observed = outcomes(400)
    predicted, observed = (np.repeat(of, 5, axis=0) for of in (predicted, observed))
    apart, grouped = (
        answer(predicted, observed, units=units)["in_force"]["kept_quality"]
        for units in (np.arange(2000), np.repeat(np.arange(400), 5))
    )
    assert grouped["high"] - grouped["low"] > 1.8 * (apart["high"] - apart["low"])


def test_a_cheaper_threshold_is_named_with_what_it_saves_and_loses() -> None:
    chance = np.random.default_rng(1)
    gain = chance.uniform(size=4000)  # predicted; below 0.4 there is none in truth
    predicted = np.stack([0.95 - 0.9 * gain, np.full(4000, 0.95)], 1)
    small = np.where(gain < 0.4, 0.9, 0.3)
    observed = (chance.uniform(size=(4000, 2)) < np.stack([small, np.full(4000, 0.9)], 1)).astype(float)
    found = answer(predicted, observed, replace(ROUTING, threshold=0.95))
    other = found["alternative"]
    assert other["direction"] == "cheaper"
    assert 0.55 < other["threshold"] < 0.75
    assert other["lost"]["high"] <= MAX_LOSS
    assert other["saved"] == pytest.approx(found["in_force"]["cost"] - other["cost"])
    lost = other["lost"]
    amount = f"{100 * abs(lost['value']):.1f} ["
    clause = f"; threshold {other['threshold']:.4g} would save {points(other['saved'])} points more and "
    assert f"{clause}{'lose' if lost['value'] >= 0 else 'gain'} {amount}" in found["sentence"]


def test_the_search_for_a_cheaper_threshold_ends_at_the_first_that_may_lose_too_much() -> None:
    """Far below, a lucky stretch of prompts looks free; it is not reached across thresholds that lose."""
    predicted, observed = outcomes(3000)
    at = sweep_thresholds(predicted, "gain", [0.85])
    sweep = sweep_outcomes(observed, predicted, np.ones(3000), "gain", at, np.arange(3000), (1.0, 5.0))
    index = int(np.searchsorted(at, 0.85))
    lucky = replace(sweep, routed=replace(sweep.routed, draws=sweep.routed.draws.copy()))
    lucky.routed.point[0], lucky.routed.draws[:, 0] = 1.0, 1.0
    assert cheaper_threshold(lucky, index) == cheaper_threshold(sweep, index) != 0


def test_where_nothing_cheaper_keeps_as_much_a_dearer_threshold_is_named() -> None:
    predicted, observed = outcomes(3000)
    found = answer(predicted, observed, replace(ROUTING, threshold=0.6))
    other = found["alternative"]
    assert other["direction"] == "dearer"
    assert other["kept_quality"]["low"] >= 1 - MAX_LOSS
    assert other["threshold"] > 0.6
    assert (
        f"nothing cheaper is shown to keep as much, and threshold {other['threshold']:.4g} would cost"
        in (found["sentence"])
    )


def test_a_dearer_threshold_that_gains_nothing_is_not_named() -> None:
    """The small pool is right where it serves, and the large one is not always: going up only costs."""
    chance = np.random.default_rng(3)
    hard = chance.uniform(size=1500) < 0.5
    predicted = np.where(hard[:, None], [0.4, 0.9], [0.9, 0.9]) - chance.uniform(0, 0.3, (1500, 1)) * [1, 0]
    truth = np.where(hard[:, None], [0.2, 0.9], [1.0, 0.9])
    observed = (chance.uniform(size=truth.shape) < truth).astype(float)
    found = answer(predicted, observed, replace(ROUTING, threshold=0.7))
    assert found["in_force"]["kept_quality"]["low"] > 1
    assert found["alternative"] is None
    assert found["sentence"].endswith("; nothing cheaper is shown to keep as much.")


def test_without_costs_the_sentence_speaks_of_shares() -> None:
    predicted, observed = outcomes(3000)
    found = answer(predicted, observed, replace(ROUTING, costs=None, threshold=0.95))
    assert "cost" not in found["in_force"]
    pattern = r"At threshold 0\.95 you send \d+% to large and keep [\d.]+% \[.*\] of all-large's quality"
    assert re.match(pattern, found["sentence"])
    assert "cost" not in found["sentence"]
    assert f"would send {points(found['alternative']['saved'])} points less to large and" in found["sentence"]


def test_routing_that_knows_nothing_is_said_to_be_no_better_than_random() -> None:
    found = answer(*outcomes(1500, knows=False))
    above = found["in_force"]["kept_above_random"]
    assert above["low"] <= 0 <= above["high"]
    assert found["remarks"][0].startswith("This is not shown to be better than random routing with the same shares")
    predicted, observed = outcomes(3000)
    upside_down = np.stack([predicted[:, 0].max() + predicted[:, 0].min() - predicted[:, 0], predicted[:, 1]], 1)
    assert answer(upside_down, observed)["remarks"][0].startswith("This is worse than random routing")


def test_a_large_pool_that_is_no_better_is_the_answer() -> None:
    predicted, observed = outcomes(1500)
    found = answer(predicted, observed[:, ::-1])
    large, small = observed.mean(0)[0], observed.mean(0)[1]
    assert found["sentence"].startswith(
        f"Large is no better than small on these prompts (quality {large:.3f} against {small:.3f})"
    )
    assert "Sending everything to small costs 20% of all-large's cost." in found["remarks"][0]
    assert found["alternative"] is None
    equal = answer(*outcomes(200, gap=0.05, seed=3))
    assert equal["gap"]["low"] < 0 < equal["gap"]["value"]
    assert "Nor is large shown to be better than small here" in equal["remarks"][-1]


def test_too_few_prompts_give_no_quality() -> None:
    predicted, observed = outcomes(49)
    found = answer(predicted, observed)
    assert not found["measured"]
    assert "kept_quality" not in found["in_force"]
    assert found["sentence"].endswith(
        "how much quality that keeps can't be said: only 49 prompts have labels of every pool, and fewer than 50 show"
        " too little."
    )
    assert answer(*outcomes(50))["measured"]
    nothing = headline(Evidence(None, 0), ROUTING, predicted, np.ones(49), POOLS)
    assert nothing["sentence"].endswith("can't be said: no prompt has labels of every pool.")


def test_an_interval_that_rests_on_a_few_prompts_says_so() -> None:
    predicted, observed = outcomes(300)
    found = answer(predicted, observed, replace(ROUTING, threshold=0.99))
    assert found["differing"] < 10
    assert f"Only {found['differing']} of the 300 prompts have another outcome here" in found["remarks"][1]
    assert "a loss of 1 points could stay unseen" in found["remarks"][1]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.456, "46%"), (0.004, "0.4%"), (0.996, "99.6%"), (0, "0%"), (1, "100%")]
)
def test_a_little_is_not_shown_as_nothing(value: float, shown: str) -> None:
    assert percent(value) == shown


def test_differences_have_signs_but_for_nought() -> None:
    assert difference_text({"value": 0.021, "low": -0.0004, "high": 0.04}) == "+2.1 [0.0, +4.0]"
    assert difference_text(dict.fromkeys(("value", "low", "high"), float("nan"))) == ""
