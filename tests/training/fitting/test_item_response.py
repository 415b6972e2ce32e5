"""Question factors on simulated outcomes, whose easiness and ability are known."""

import numpy as np

from depo_gateway.estimator.logistic import sigmoid
from depo_gateway.training.fitting.item_response import fit_rasch, question_factors


def simulated(questions: int, models: int, second: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outcomes, easiness, a second factor that helps the even models and hurts the odd ones)."""
    random = np.random.default_rng(0)
    easiness, factor = random.normal(0, 1.5, questions), random.normal(0, 1, questions)
    sign = np.where(np.arange(models) % 2 == 0, second, -second)
    logits = easiness[:, None] + np.linspace(-1, 1, models) + factor[:, None] * sign
    return (random.random(logits.shape) < sigmoid(logits)).astype(float), easiness, factor


def test_easiness_and_ability_are_recovered() -> None:
    outcomes, easiness, _ = simulated(500, 40)
    found, ability = fit_rasch(outcomes)
    assert np.corrcoef(found, easiness)[0, 1] > 0.9
    assert np.corrcoef(ability, np.linspace(-1, 1, 40))[0, 1] > 0.95


def test_ability_does_not_depend_on_which_questions_a_model_answered() -> None:
    outcomes, easiness, _ = simulated(500, 20)
    outcomes[np.argsort(easiness)[:250], 10] = np.nan  # answers the easy half only, so its mean is high
    _, ability = fit_rasch(outcomes)
    assert np.nanmean(outcomes[:, 10]) > np.nanmean(outcomes[:, 15])
    assert ability[10] < ability[15]


def test_the_first_component_is_what_sets_models_apart() -> None:
    outcomes, _, factor = simulated(500, 20, second=1.0)
    found = question_factors(outcomes)
    assert abs(np.corrcoef(found[:, 1], factor)[0, 1]) > 0.7
    assert abs(np.corrcoef(found[:, 2], factor)[0, 1]) < 0.3


def test_a_single_other_model_gives_an_easiness_only() -> None:
    outcomes, _, _ = simulated(100, 1)
    found = question_factors(outcomes)
    assert found.shape == (100, 1)
    assert np.isfinite(found).all()
    assert found[outcomes[:, 0] == 1].min() > found[outcomes[:, 0] == 0].max()


def test_outcomes_that_are_all_equal_are_no_fault() -> None:
    assert np.isfinite(question_factors(np.ones((60, 3)))).all()
