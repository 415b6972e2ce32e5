"""The distance between live confidences and a calibration's."""

import math
import random

import numpy as np
import pytest

from depo_gateway.estimator import calibration
from depo_gateway.estimator.calibration import Curve
from depo_gateway.gateway import score_drift
from depo_gateway.gateway.score_drift import ScoreDrift


def curve_of(confidences: list[float]) -> Curve:
    small = np.array(confidences)
    quality = np.stack([small, np.ones_like(small)], 1)
    return calibration.measure_curve(quality, np.full_like(quality, np.nan), np.ones(len(small)), "gain")


def seen(curve: Curve | None, confidences: list[float]) -> float:
    watched = ScoreDrift(curve)
    for confidence in confidences:
        watched.saw(confidence)
    return watched.distance


def test_the_same_traffic_is_near_and_other_traffic_is_far() -> None:
    chance = random.Random(0)
    curve = curve_of([chance.betavariate(8, 2) for _ in range(5000)])
    assert seen(curve, [chance.betavariate(8, 2) for _ in range(2000)]) < 0.05
    assert seen(curve, [chance.betavariate(2, 8) for _ in range(2000)]) > 0.8


def test_it_is_kolmogorovs_and_smirnovs() -> None:
    chance = np.random.default_rng(0)
    calibrated, live = chance.beta(4, 2, 4000), chance.beta(3, 3, 2000)
    everywhere = np.concatenate([calibrated, live])
    steps = [np.searchsorted(np.sort(values), everywhere, side="right") / len(values) for values in (calibrated, live)]
    expected = float(np.abs(steps[0] - steps[1]).max())
    assert seen(curve_of(list(calibrated)), list(live)) == pytest.approx(expected, abs=0.01)


def test_equal_confidences_are_no_distance() -> None:
    assert seen(curve_of([1.0] * 90 + [0.5] * 10), ([1.0] * 9 + [0.5]) * 200) == pytest.approx(0.0, abs=1e-9)


def test_it_is_silent_until_there_are_enough() -> None:
    curve = curve_of([index / 100 for index in range(100)])
    assert math.isnan(seen(curve, [0.5] * (score_drift.ENOUGH - 1)))
    assert seen(curve, [0.5] * score_drift.ENOUGH) == pytest.approx(0.5, abs=0.02)
    assert math.isnan(seen(None, [0.5] * 1000))


def test_what_is_long_past_is_forgotten() -> None:
    chance = random.Random(1)
    curve = curve_of([chance.random() for _ in range(5000)])
    values = [chance.random() / 2 for _ in range(5000)] + [chance.random() for _ in range(score_drift.DRIFT_WINDOW)]
    assert seen(curve, values) < 0.05
