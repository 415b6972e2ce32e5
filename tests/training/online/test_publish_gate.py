"""What the gate publishes, what it refuses, and its figures against numbers computed by hand."""

from dataclasses import replace

import numpy as np
import pytest

from depo_gateway.training.evaluation.routing_metrics import apgr, calibration_error
from depo_gateway.training.online.publish_gate import (
    Holdout,
    area_over_random,
    assess,
    chance_error,
    gains,
)
from depo_gateway.training.online.refresh_config import GateConfig

POOLS = ("small", "large")
CONFIG = GateConfig(resamples=300)


def prompts(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(true qualities (N, 2), labels drawn from them): half the prompts are hard for the small pool."""
    generator = np.random.default_rng(seed)
    small = generator.uniform(0.05, 0.95, count)
    truth = np.stack([small, 0.5 + 0.45 * generator.uniform(size=count)], 1)
    return truth, (generator.uniform(size=truth.shape) < truth).astype(float)


def holdout(candidate: np.ndarray, champion: np.ndarray | None, observed: np.ndarray) -> Holdout:
    ones = np.ones(len(observed))
    return Holdout(POOLS, candidate, champion, observed, ones, np.full(len(ones), -1), ones)


def dulled(truth: np.ndarray, noise: float) -> np.ndarray:
    """Predictions that know less, and are calibrated about as well."""
    generator = np.random.default_rng(9)
    return truth.mean(0) + (truth - truth.mean(0)) * (generator.uniform(size=(len(truth), 1)) > noise)


def test_the_area_is_apgr_in_units_of_quality() -> None:
    truth, observed = prompts(400)
    score, gain = truth[:, 1] - truth[:, 0], observed[:, 1] - observed[:, 0]
    (area,) = area_over_random(score, gain, np.ones((1, 400)))
    assert 0.5 + area / gain.mean() == pytest.approx(apgr(score, observed[:, 0], observed[:, 1]))
    tied = np.round(score, 1)
    (area,) = area_over_random(tied, gain, np.ones((1, 400)))
    assert 0.5 + area / gain.mean() == pytest.approx(apgr(tied, observed[:, 0], observed[:, 1]))
    # two prompts, gains 1 and 0, quality 0, .5, .5 at shares 0, .5, 1: .375, random routing's .25
    assert area_over_random(np.array([2.0, 1.0]), np.array([1.0, 0.0]), np.ones((1, 2))).tolist() == [0.125]
    # weighing a prompt twice is having it twice
    doubled = area_over_random(np.array([3.0, 2.0, 1.0]), np.array([1.0, 0.0, 1.0]), np.array([[1.0, 2.0, 1.0]]))
    spelt_out = area_over_random(np.array([3.0, 2.0, 2.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0]), np.ones((1, 4)))
    assert doubled.tolist() == pytest.approx(spelt_out.tolist())


def test_a_better_candidate_passes_and_a_worse_one_is_refused() -> None:
    truth, observed = prompts(600)
    worse = dulled(truth, 0.6)
    verdict = assess(holdout(truth, worse, observed), None, CONFIG)
    assert (verdict.publish, verdict.reasons) == (True, ())
    assert verdict.figures["newest"]["area_difference"][1] > 0
    verdict = assess(holdout(worse, truth, observed), None, CONFIG)
    assert not verdict.publish
    assert verdict.reasons[0].startswith("it routes the newest prompts worse than the champion: mean quality -0.0")


def test_the_same_again_is_no_better() -> None:
    truth, observed = prompts(600)
    verdict = assess(holdout(truth, truth, observed), None, CONFIG)
    assert verdict.reasons == (
        "it is no better than the champion on the newest prompts: mean quality +0.0000, held-out loss +0.0000",
    )


def test_a_first_candidate_is_compared_with_random_routing() -> None:
    truth, observed = prompts(600)
    assert assess(holdout(truth, None, observed), None, CONFIG).publish
    backwards = truth[:, ::-1].mean(1, keepdims=True) * 2 - truth
    assert "worse than random routing" in assess(holdout(backwards, None, observed), None, CONFIG).reasons[0]


def test_a_reference_set_has_a_veto() -> None:
    truth, observed = prompts(600)
    newest = holdout(truth, dulled(truth, 0.3), observed)
    other, found = prompts(600, seed=1)
    assert assess(newest, holdout(other, dulled(other, 0.5), found), CONFIG).publish
    (reason,) = assess(newest, holdout(dulled(other, 0.8), other, found), CONFIG).reasons
    assert reason.startswith("it routes the reference set worse than the champion")


def test_probabilities_beyond_the_bound_are_refused() -> None:
    truth, observed = prompts(2000)
    boastful = np.stack([truth[:, 0], np.minimum(truth[:, 1] + 0.15, 0.99)], 1)
    verdict = assess(holdout(boastful, dulled(truth, 0.5), observed), None, CONFIG)
    assert [reason.split(" is ")[0] for reason in verdict.reasons] == [
        "the calibration error of the quality of pool 'large'",
        "the calibration error of the gain",
    ]
    assert set(verdict.figures["calibration_error"]) == {"small", "large", "gain"}
    loose = replace(CONFIG, calibration_error=0.3)
    assert assess(holdout(boastful, dulled(truth, 0.5), observed), None, loose).publish


def test_a_near_constant_router_is_refused() -> None:
    truth, observed = prompts(600)
    flat = observed.mean(0) + 0.01 * (truth - truth.mean(0))
    reason = assess(holdout(flat, None, observed), None, replace(CONFIG, calibration_error=1.0)).reasons[-1]
    assert reason.startswith("it is a near-constant router: confidence spreads over 0.0")


def test_too_few_labels_are_a_refusal() -> None:
    truth, observed = prompts(40)
    assert assess(holdout(truth, None, observed), None, CONFIG).reasons == (
        "40 newest prompts have labels, and 50 are required to distinguish harm from noise",
    )
    truth, observed = prompts(100)
    observed[15:, 1] = np.nan
    assert assess(holdout(truth, None, observed), None, CONFIG).reasons == (
        "pool 'large' has fewer than 20 labels on the newest prompts",
    )


def served_alone(count: int) -> tuple[np.ndarray, Holdout]:
    """Labels of the served pool only, which random routing with known propensities chose."""
    truth, observed = prompts(count)
    generator = np.random.default_rng(5)
    chance = np.where(truth[:, 0] > 0.5, 0.2, 0.8)  # of the large pool
    served = (generator.uniform(size=count) < chance).astype(np.int64)
    observed[np.arange(count), 1 - served] = np.nan
    inverse = 1 / np.where(served == 1, chance, 1 - chance)
    return truth, Holdout(POOLS, truth, truth, observed, np.ones(count), served, inverse)


def test_gains_of_the_served_pool_alone_are_unbiased_whatever_is_expected() -> None:
    truth, alone = served_alone(40_000)
    blind = replace(alone, candidate=np.full(truth.shape, 0.5))
    gain = gains(blind, np.full(truth.shape, 0.5))
    for rows in (truth[:, 0] > 0.5, truth[:, 0] <= 0.5):
        assert gain[rows].mean() == pytest.approx((truth[:, 1] - truth[:, 0])[rows].mean(), abs=0.03)


def test_partial_labels_tell_better_from_worse() -> None:
    truth, alone = served_alone(3000)
    dull = dulled(truth, 0.7)
    verdict = assess(replace(alone, champion=dull), None, CONFIG)
    assert verdict.publish
    assert (verdict.figures["newest"]["all_labels"], verdict.figures["newest"]["prompts"]) == (False, 3000)
    assert "gain" not in verdict.figures["calibration_error"]
    assert "worse than the champion" in assess(replace(alone, candidate=dull), None, CONFIG).reasons[0]


def test_prompts_of_no_trust_do_not_count() -> None:
    truth, observed = prompts(1200)
    trust = np.repeat([1.0, 0.0], 600)
    lies = np.concatenate([observed[:600], 1 - observed[600:]])
    mixed = replace(holdout(truth, dulled(truth, 0.6), lies), trust=trust)
    assert assess(mixed, None, CONFIG).publish


def test_chance_covers_the_error_of_perfect_probabilities() -> None:
    beyond = 0
    for seed in range(200):
        truth, observed = prompts(300, seed)
        beyond += calibration_error(truth[:, 0], observed[:, 0])["ece"] > chance_error(truth[:, 0], observed[:, 0])
    assert beyond <= 22  # 10 expected
