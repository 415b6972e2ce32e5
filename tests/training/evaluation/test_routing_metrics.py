"""APGR and the other metrics against numbers worked by hand."""

import numpy as np
import pytest

from depo_gateway.training.evaluation.routing_metrics import (
    apgr,
    at_thresholds,
    calibration_error,
    centre_by_fold,
    measure_apgr,
    routing_scores,
    share_curve,
)

SMALL, LARGE = np.array([1.0, 0.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.0])


def test_apgr_by_hand() -> None:
    small, large = np.array([1.0, 0.0]), np.array([1.0, 1.0])
    # the second prompt first: quality .5, 1, 1 over shares 0, .5, 1: area .75 + .125 = .875; (.875 - .5) / .5
    assert apgr(np.array([0.0, 1.0]), small, large) == pytest.approx(0.75)
    assert apgr(np.array([1.0, 0.0]), small, large) == pytest.approx(0.25)


def test_ties_are_taken_in_random_order() -> None:
    small, large = np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0])
    assert apgr(np.zeros(3), small, large) == pytest.approx(0.5)
    share, quality = share_curve(np.zeros(3), small, large)
    assert share.tolist() == [0.0, 1.0]
    assert quality.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_random_order_is_a_half_and_no_gap_is_nothing() -> None:
    generator = np.random.default_rng(0)
    small, large = (generator.uniform(size=(2, 20_000)) < np.array([[0.6], [0.8]])).astype(float)
    assert apgr(generator.uniform(size=20_000), small, large) == pytest.approx(0.5, abs=0.02)
    assert np.isnan(apgr(np.arange(4.0), SMALL, LARGE))


def test_the_interval_holds_the_point_and_differences_are_paired() -> None:
    generator = np.random.default_rng(0)
    hard = generator.uniform(size=2000)
    small, large = (generator.uniform(size=2000) > hard).astype(float), np.ones(2000)
    noisy = hard + generator.normal(size=2000)
    measured = measure_apgr({"length": noisy, "good": hard, "same": noisy}, small, large, resamples=200)
    good = measured["good"]
    assert good.low < good.apgr < good.high
    assert 0.01 < good.high - good.low < 0.2
    assert good.difference_low > 0
    assert measured["same"].difference_low == measured["same"].difference_high == 0.0


def test_a_score_that_only_knows_its_folds_training_mean_routes_at_random() -> None:
    generator = np.random.default_rng(0)
    pooled, corrected = [], []
    for _ in range(200):
        small, large = np.stack([generator.uniform(size=60) < 0.5, generator.uniform(size=60) < 0.8]).astype(float)
        folds = generator.permutation(60) % 5
        gain = large - small
        score = np.array([gain[folds != fold].mean() for fold in range(5)])[folds]
        pooled.append(apgr(score, small, large))
        corrected.append(apgr(centre_by_fold(score, folds), small, large))
    assert np.nanmean(pooled) < 0.4  # ranked as they are: what the training rows have too much of, the fold lacks
    assert np.nanmean(corrected) == pytest.approx(0.5, abs=0.01)
    assert not centre_by_fold(np.full(10, 0.1), np.zeros(10, np.int64)).any()  # ten times 0.1 is 0.9999999999999999


def test_intervals_of_groups_resample_groups() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 100)
    chance = generator.uniform(0.1, 0.9, 20)
    small, large = (generator.uniform(size=2000) < chance[groups]).astype(float), np.ones(2000)
    scores = {"length": generator.uniform(size=20)[groups], "good": -chance[groups]}
    prompts, whole = measure_apgr(scores, small, large), measure_apgr(scores, small, large, groups=groups)
    assert prompts["length"].apgr == whole["length"].apgr
    widths = [measured["length"].high - measured["length"].low for measured in (prompts, whole)]
    assert widths[1] > 2 * widths[0]
    alone = measure_apgr(scores, small, large, groups=np.arange(2000))
    assert alone == prompts


def test_thresholds_beside_random_routing() -> None:
    quality = np.array([[0.9, 0.9], [0.2, 0.9], [0.1, 0.2], [0.8, 0.9]])
    (at,) = at_thresholds(quality, np.stack([SMALL, LARGE], 1), "difficulty", (0.5,))
    # prompts 1 and 2 go up: served 1, 1, 0, 1
    assert at == {"threshold": 0.5, "large_share": 0.5, "quality": 0.75, "coin": 0.5}


def test_routing_scores_order_by_what_is_lost() -> None:
    scores = routing_scores(np.array([[0.5, 0.6, 0.9], [0.8, 0.7, 0.1]]))
    assert scores["gain"].tolist() == pytest.approx([0.4, -0.1])
    assert scores["difficulty"].tolist() == [-0.5, -0.8]
    assert set(routing_scores(np.array([[0.5]]))) == {"difficulty"}


def test_calibration_error_of_a_truthful_and_a_boastful_score() -> None:
    generator = np.random.default_rng(0)
    p = generator.uniform(size=20_000)
    observed = (generator.uniform(size=20_000) < p).astype(float)
    observed[::100] = np.nan
    assert calibration_error(p, observed)["ece"] < 0.02
    assert calibration_error(np.minimum(p + 0.2, 1), observed)["ece"] == pytest.approx(0.18, abs=0.03)
    assert np.isnan(calibration_error(p, np.full(20_000, np.nan))["brier"])


def test_the_debiased_error_leaves_out_what_sampling_adds() -> None:
    generator = np.random.default_rng(0)
    plain, debiased, biased = [], [], []
    for _ in range(50):
        p = generator.uniform(0.3, 0.7, 300)
        observed = (generator.uniform(size=300) < p).astype(float)
        error = calibration_error(p, observed)
        plain.append(error["ece"])
        debiased.append(error["debiased"])
        biased.append(calibration_error(p + 0.1, observed)["debiased"])
    assert np.mean(plain) > 0.05  # of a perfect prediction
    assert np.mean(debiased) < 0.6 * np.mean(plain)
    assert np.median(debiased) < 0.04
    assert np.mean(biased) == pytest.approx(0.1, abs=0.02)
