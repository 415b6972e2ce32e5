import json

import numpy as np
import pytest

from depo_gateway.training.rl.pass_rate_belief import (
    PassRateBeliefs,
    nonzero_advantage,
    nonzero_advantage_of_beta,
    strength_of,
)


def test_the_chance_of_a_non_zero_advantage_by_hand() -> None:
    found = nonzero_advantage(np.array([0.0, 0.5, 0.9, 1.0]), 8)
    assert found == pytest.approx([0.0, 1 - 2 * 0.5**8, 1 - 0.9**8 - 0.1**8, 0.0])


def test_a_beta_of_equal_parts_is_the_uniform_distribution() -> None:
    # E[p^8] of a uniform p is 1/9, twice of that is the chance of all alike
    assert nonzero_advantage_of_beta(np.ones(1), np.ones(1), 8) == pytest.approx([1 - 2 / 9])


def test_a_strong_beta_is_its_mean() -> None:
    sure = nonzero_advantage_of_beta(np.array([1e7 * 0.3]), np.array([1e7 * 0.7]), 8)
    assert sure == pytest.approx(nonzero_advantage(np.array([0.3]), 8), abs=1e-5)


@pytest.mark.parametrize("true_strength", [1.0, 8.0, 64.0])
def test_the_strength_of_predictions_is_found_again(true_strength: float) -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.1, 0.9, 4000)
    rates = rng.beta(true_strength * predicted, true_strength * (1 - predicted))
    passed = rng.binomial(8, rates)
    found = strength_of(predicted, passed / 8, np.full(4000, 8.0), np.ones(4000))
    assert 0.5 <= found / true_strength <= 2


def test_a_prompts_own_outcomes_count_and_fade() -> None:
    beliefs = PassRateBeliefs(calibrate=False, half_life=10)
    unknown = beliefs.nonzero_advantage([7], np.zeros(1), 8, step=0)[0]
    beliefs.learn(7, 0.0, 0.0, 8, 1.0, step=0)
    beliefs.strength = 4.0
    right_after, later, much_later = (beliefs.nonzero_advantage([7], np.zeros(1), 8, step)[0] for step in (0, 10, 500))
    # own: 8 failures; then 4; then none. The prediction itself is Beta(2, 2)
    assert right_after == pytest.approx(nonzero_advantage_of_beta(np.array([2.0]), np.array([10.0]), 8)[0])
    assert later == pytest.approx(nonzero_advantage_of_beta(np.array([2.0]), np.array([6.0]), 8)[0])
    assert much_later == pytest.approx(nonzero_advantage_of_beta(np.array([2.0]), np.array([2.0]), 8)[0])
    assert right_after < later < much_later < unknown


def test_without_a_half_life_a_prompts_own_outcomes_are_not_kept() -> None:
    beliefs = PassRateBeliefs(calibrate=False, half_life=0)
    before = beliefs.nonzero_advantage([7], np.zeros(1), 8, step=0)
    beliefs.learn(7, 0.0, 0.0, 8, 1.0, step=0)
    assert beliefs.nonzero_advantage([7], np.zeros(1), 8, step=0) == before


def test_predictions_that_are_too_sure_are_calibrated_on_recent_labels() -> None:
    rng = np.random.default_rng(1)
    beliefs = PassRateBeliefs(calibrate=True, half_life=0)
    truth = rng.normal(0, 1, 400)
    for row, logit in enumerate(truth):
        passed = rng.binomial(8, 1 / (1 + np.exp(-logit)))
        beliefs.learn(row, 3 * logit + 1, passed / 8, 8, 1.0, step=0)  # three times too sure, and shifted
    beliefs.refit()
    assert beliefs.platt.slope == pytest.approx(1 / 3, abs=0.06)
    assert beliefs.predicted(np.array([1.0]))[0] == pytest.approx(0.5, abs=0.05)


def test_resumed_beliefs_are_the_same() -> None:
    rng = np.random.default_rng(2)
    beliefs = PassRateBeliefs(calibrate=True, half_life=20)
    for step in range(60):
        beliefs.learn(int(rng.integers(20)), rng.normal(), float(rng.integers(9)) / 8, 8, 1.0, step)
    beliefs.refit()
    again = PassRateBeliefs(calibrate=True, half_life=20)
    again.load_state_dict(json.loads(json.dumps(beliefs.state_dict())))
    rows, logits = list(range(30)), rng.normal(size=30)
    assert np.array_equal(beliefs.nonzero_advantage(rows, logits, 8, 61), again.nonzero_advantage(rows, logits, 8, 61))
