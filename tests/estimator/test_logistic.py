"""The one logistic fit: it solves the penalised likelihood's equations, and its options do what they say."""

import numpy as np
import pytest

from depo_gateway.estimator.logistic import fit_logistic, sigmoid


def sample(rows: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A design with an intercept, targets and weights."""
    generator = np.random.default_rng(0)
    design = np.concatenate([generator.normal(size=(rows, 3)), np.ones((rows, 1))], 1)
    targets = (generator.uniform(size=rows) < sigmoid(design @ np.array([1.0, -2.0, 0.0, 0.5]))).astype(float)
    return design, targets, generator.uniform(0.2, 2.0, rows)


def test_the_gradient_of_the_penalised_likelihood_is_zero() -> None:
    design, targets, weights = sample()
    prior, ridge = np.array([1.0, 0.0, 0.0, 0.0]), np.array([5.0, 1.0, 1.0, 0.1])
    beta = fit_logistic(design, targets, weights, prior, ridge)
    gradient = design.T @ (weights * (targets - sigmoid(design @ beta))) - ridge * (beta - prior)
    assert np.abs(gradient).max() < 1e-6


def test_a_strong_ridge_keeps_the_prior_and_separable_labels_stay_finite() -> None:
    design, targets, weights = sample()
    prior = np.array([1.0, 2.0, 3.0, 4.0])
    assert fit_logistic(design, targets, weights, prior, np.full(4, 1e9)) == pytest.approx(prior, abs=1e-3)
    separable = fit_logistic(design, (design[:, 0] > 0).astype(float), weights, np.zeros(4), np.ones(4))
    assert 1 < separable[0] < 100


def test_steps_are_bounded_and_counted() -> None:
    design, targets, weights = sample()
    start = np.full(4, 3.0)
    once = fit_logistic(design, targets, weights, start, np.full(4, 1e-6), steps=1, longest=0.25)
    assert np.abs(once - start).max() == pytest.approx(0.25)
    plain = fit_logistic(design, targets, weights, start, np.full(4, 1e-6), steps=1, longest=np.inf)
    assert np.abs(plain - start).max() > 0.25
    early = fit_logistic(design, targets, weights, np.zeros(4), np.ones(4), tolerance=1e3)
    assert early.tolist() == fit_logistic(design, targets, weights, np.zeros(4), np.ones(4), steps=1).tolist()
