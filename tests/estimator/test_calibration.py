"""Probabilities from logits, and thresholds that do what is asked of them."""

import dataclasses

import numpy as np
import pytest

from depo_gateway.estimator import calibration
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration, Familiarity, Platt
from depo_gateway.estimator.logistic import sigmoid
from tests.stages import uncalibrated_stage


def outcomes(seed: int = 0, n: int = 4000) -> tuple[Array, Array]:
    """Quality (N, 2) that is right about prompts, and outcomes drawn from it."""
    generator = np.random.default_rng(seed)
    quality = np.stack([generator.uniform(0.2, 0.9, n), generator.uniform(0.6, 0.95, n)], 1)
    return quality, (generator.uniform(size=(n, 2)) < quality).astype(float)


@pytest.fixture(scope="module")
def calibrated() -> Calibration:
    quality, observed = outcomes()
    curves = {
        rule: calibration.measure_curve(quality, observed, np.ones(len(quality)), rule) for rule in calibration.RULES
    }
    stage = {"quality": (Platt(), Platt(2.0, -1.0)), "token_confidence": (Platt(), Platt())}
    return Calibration(("small", "large"), {"full": stage, "cheap": stage}, curves, {"cost=0.5": {"gain": 0.7}})


def test_platt_recovers_a_known_map() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=20_000)
    observed = (generator.uniform(size=20_000) < sigmoid(0.5 * logits + 0.7)).astype(float)
    fitted = calibration.fit_platt(logits, observed, np.ones(20_000))
    assert fitted.slope == pytest.approx(0.5, abs=0.05)
    assert fitted.offset == pytest.approx(0.7, abs=0.05)


def test_platt_stays_the_identity_where_labels_tell_nothing() -> None:
    logits = np.linspace(-1, 1, 100)
    assert calibration.fit_platt(logits, np.full(100, np.nan), np.ones(100)) == Platt()
    assert calibration.fit_platt(logits, np.ones(100), np.ones(100)) == Platt()
    assert calibration.fit_platt(logits[:5], np.array([0, 1, 0, 1, 1.0]), np.ones(5)) == Platt()


def test_platt_keeps_the_order_even_of_a_backward_model_and_is_finite_when_separable() -> None:
    logits = np.linspace(-3, 3, 200)
    assert calibration.fit_platt(logits, (logits < 0).astype(float), np.ones(200)).slope > 0
    separable = calibration.fit_platt(logits, (logits > 0).astype(float), np.ones(200))
    assert 1 < separable.slope < 100


def test_confidence_is_what_the_contract_says() -> None:
    quality = np.array([[0.5, 0.8], [0.9, 0.6], [0.1, 0.1]])
    assert calibration.confidence(quality, "gain")[:, 0] == pytest.approx([0.7, 1.0, 1.0])
    assert calibration.confidence(quality, "difficulty")[:, 0] == pytest.approx([0.5, 0.9, 0.1])
    with pytest.raises(ValueError, match="'luck' is unknown"):
        calibration.confidence(quality, "luck")


def test_the_cheapest_sure_pool_serves_and_the_last_if_none_is() -> None:
    quality = np.array([[0.5, 0.75, 0.8], [0.9, 0.6, 0.8], [0.2, 0.3, 0.9]])
    assert calibration.route(quality, "gain", 0.9).tolist() == [1, 0, 2]
    assert calibration.route(quality, "difficulty", 0.85).tolist() == [2, 0, 2]
    assert calibration.route(quality, "difficulty", 0.95).tolist() == [2, 2, 2]


@pytest.mark.parametrize("rule", calibration.RULES)
def test_a_threshold_for_a_share_gives_that_share(calibrated: Calibration, rule: str) -> None:
    quality, _ = outcomes(seed=1)
    for share in (0.1, 0.3, 0.55):
        threshold = calibrated.threshold(rule, large_share=share)
        served = (calibration.route(quality, rule, threshold) == 1).mean()
        assert served == pytest.approx(share, abs=0.03)
        assert calibrated.large_share(rule, threshold) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("rule", calibration.RULES)
def test_the_share_at_a_threshold_as_people_write_it_is_exact(calibrated: Calibration, rule: str) -> None:
    """Between the quantiles of a curve it was rounded up, by as much as one point: wider than an interval of many."""
    sure = calibration.confidence(outcomes()[0], rule)[:, 0]
    for threshold in (0.5, 0.7, 0.8, 0.85, 0.9, 0.95):
        assert calibrated.large_share(rule, threshold) == (sure < threshold).mean()


def test_a_threshold_for_quality_keeps_it_and_no_lower_one_does(calibrated: Calibration) -> None:
    quality, observed = outcomes(seed=1)
    threshold = calibrated.threshold("gain", quality=0.98)
    pool = calibration.route(quality, "gain", threshold)
    kept = observed[np.arange(len(pool)), pool].mean() / observed[:, 1].mean()
    assert kept == pytest.approx(0.98, abs=0.02)
    assert (pool == 1).mean() < 0.9


def test_a_threshold_for_cost_spends_it(calibrated: Calibration) -> None:
    threshold = calibrated.threshold("gain", cost=0.4, costs=(1.0, 5.0))
    share = calibrated.large_share("gain", threshold)
    assert share + (1 - share) * 0.2 == pytest.approx(0.4, abs=0.02)
    with pytest.raises(ValueError, match=r"cost=0\.1 can't be met"):
        calibrated.threshold("gain", cost=0.1, costs=(1.0, 5.0))
    with pytest.raises(ValueError, match="cost of each of small, large"):
        calibrated.threshold("gain", cost=0.5)


def test_the_ends_of_a_curve(calibrated: Calibration) -> None:
    assert calibrated.large_share("gain", 0.0) == 0.0
    assert calibrated.large_share("difficulty", 1.0) == 1.0
    assert calibrated.threshold("difficulty", large_share=0.0) <= calibrated.threshold("difficulty", large_share=1.0)
    for wrong in ({}, {"large_share": 0.1, "quality": 0.9}, {"quality": 1.5}):
        with pytest.raises(ValueError, match="one target"):
            calibrated.threshold("gain", **wrong)
    with pytest.raises(ValueError, match="no curve for the rule 'luck'"):
        calibrated.large_share("luck", 0.5)


def test_a_curve_without_labels_of_every_pool_has_no_quality() -> None:
    quality, observed = outcomes()
    observed[:, 1] = np.nan
    measured = calibration.measure_curve(quality, observed, np.ones(len(quality)), "gain")
    assert measured.quality is None
    stage = uncalibrated_stage(2)
    unlabelled = Calibration(("small", "large"), {"full": stage, "cheap": stage}, {"gain": measured})
    with pytest.raises(ValueError, match="labels of every pool"):
        unlabelled.threshold("gain", quality=0.9)


def test_the_highest_threshold_sends_everything_to_the_last_of_three_pools() -> None:
    generator = np.random.default_rng(0)
    quality = np.stack([generator.uniform(a, b, 2000) for a, b in ((0.1, 0.4), (0.3, 0.9), (0.6, 0.95))], 1)
    stage = uncalibrated_stage(3)
    curves = {rule: calibration.measure_curve(quality, quality, np.ones(2000), rule) for rule in calibration.RULES}
    three = Calibration(("a", "b", "c"), {"full": stage, "cheap": stage}, curves)
    assert three.curves["difficulty"].shares[-1] == (0.0, 0.0, 1.0)
    for rule, share in (("difficulty", 0.1), ("difficulty", 0.9), ("gain", 0.6)):
        threshold = three.threshold(rule, large_share=share)
        assert (calibration.route(quality, rule, threshold) == 2).mean() == pytest.approx(share, abs=0.02)
        assert three.large_share(rule, threshold) == pytest.approx(share, abs=0.02)


def test_a_share_beyond_what_a_tie_at_one_lets_go_gets_one_and_says_what_that_does() -> None:
    generator = np.random.default_rng(0)
    quality = np.stack([generator.uniform(0.3, 0.9, 2000), np.full(2000, 0.6)], 1)  # the first is best in half
    measured = calibration.measure_curve(quality, quality, np.ones(2000), "gain")
    assert measured.thresholds[0] == 0.0
    assert measured.thresholds[-1] == 1.0
    stage = uncalibrated_stage(2)
    tied = Calibration(("small", "large"), {"full": stage, "cheap": stage}, {"gain": measured})
    reached = tied.large_share("gain", 1.0)
    assert reached == pytest.approx(0.5, abs=0.05)
    for share in (0.55, 0.7, 1.0):
        assert tied.threshold("gain", large_share=share) == 1.0
    assert tied.threshold("gain", large_share=0.4) < 1.0
    assert measured.all_large == pytest.approx(0.6)
    kept = tied.threshold("gain", quality=1.0)
    served = np.take_along_axis(quality, calibration.route(quality, "gain", kept)[:, None], 1).mean()
    assert served >= 0.6
    assert tied.large_share("gain", kept) < reached  # the small pool's best prompts pay for others it keeps
    old = dataclasses.replace(
        measured, thresholds=(*measured.thresholds, 1.0 + 2e-16), shares=(*measured.shares, (0, 1))
    )
    older = dataclasses.replace(tied, curves={"gain": old})
    assert older.threshold("gain", large_share=1.0) == 1.0


def test_one_pools_large_share_is_what_it_is_not_sure_of() -> None:
    quality = np.random.default_rng(0).uniform(0.2, 0.8, (2000, 1))
    stage = uncalibrated_stage(1)
    measured = calibration.measure_curve(quality, quality, np.ones(2000), "difficulty")
    alone = Calibration(("policy",), {"full": stage, "cheap": stage}, {"difficulty": measured})
    threshold = alone.threshold("difficulty", large_share=0.3)
    assert (quality < threshold).mean() == pytest.approx(0.3, abs=0.01)
    assert alone.large_share("difficulty", 0.0) == 0.0
    assert alone.large_share("difficulty", 1.0) == 1.0
    with pytest.raises(ValueError, match="two pools or more"):
        alone.threshold("difficulty", cost=0.5, costs=(1.0,))


@pytest.mark.parametrize("means", [(0.5,), (0.5, 1.0), (0.0, 0.5)])
def test_familiarity_with_means_that_cannot_be_served_is_refused(
    calibrated: Calibration, means: tuple[float, ...]
) -> None:
    spoilt = dataclasses.replace(calibrated, familiarity=Familiarity(1.0, 2.0, means))
    with pytest.raises(ValueError, match="familiarity needs a mean between 0 and 1 of each pool"):
        calibration.loads(calibration.dumps(spoilt))
    whole = dataclasses.replace(calibrated, familiarity=Familiarity(1.0, 2.0, (0.4, 0.7)))
    assert calibration.loads(calibration.dumps(whole)).familiarity == whole.familiarity


def test_it_survives_being_written_and_read(calibrated: Calibration) -> None:
    assert calibration.loads(calibration.dumps(calibrated)) == calibrated
    with pytest.raises(ValueError, match="not a calibration"):
        calibration.loads(b'{"pools": []}')
