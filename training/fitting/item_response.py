"""Item response theory: how easy questions are, and how they differ beyond that, from the outcomes of many models.

The probability that model j answers question q is sigmoid(easiness_q + ability_j) (Rasch). What this leaves
unexplained is reduced to a few principal components: questions that the same models find unexpectedly hard.

Shapes: Q questions, J models, F factors.
"""

from __future__ import annotations

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.logistic import sigmoid

COMPONENTS = 3  # at most; on GSM8K and MATH 20 were no better
EASINESS_RIDGE, ABILITY_RIDGE = 0.3, 0.1  # in outcomes: keep what all models or none can do finite
ROUNDS, TOLERANCE = 30, 0.01  # of alternating Newton steps, each at most 1; the last one moved nothing by more


def question_factors(outcomes_QJ: Array) -> Array:
    """Factors (Q, F) of questions: the easiness, then principal components, the first of unit mean square.

    NaN: no outcome.
    """
    seen = ~np.isnan(outcomes_QJ)
    easiness_Q, ability_J = fit_rasch(outcomes_QJ)
    expected_QJ = sigmoid(easiness_Q[:, None] + ability_J)
    residual_QJ = np.where(seen, np.nan_to_num(outcomes_QJ) - expected_QJ, 0.0)
    count = min(COMPONENTS, outcomes_QJ.shape[1] - 1)
    values, vectors = np.linalg.eigh(residual_QJ.T @ residual_QJ)
    largest = float(values[-1])
    if count < 1 or largest <= 1e-9:
        return easiness_Q[:, None]
    components_QF = residual_QJ @ vectors[:, ::-1][:, :count] * np.sqrt(len(outcomes_QJ) / largest)
    return np.column_stack([easiness_Q, components_QF])


def fit_rasch(outcomes_QJ: Array) -> tuple[Array, Array]:
    """(easiness (Q,), ability (J,)), in logits, by penalised maximum likelihood. NaN: no outcome."""
    seen = ~np.isnan(outcomes_QJ)
    known = np.nan_to_num(outcomes_QJ)
    easiness = np.zeros(len(outcomes_QJ))
    mean = (known.sum(0) + 0.5) / (seen.sum(0) + 1.0)
    ability = np.log(mean / (1 - mean))
    for _ in range(ROUNDS):
        step_Q = _step(known, seen, easiness, ability, 1, EASINESS_RIDGE * easiness, EASINESS_RIDGE)
        easiness = easiness + step_Q
        step_J = _step(known, seen, easiness, ability, 0, ABILITY_RIDGE * ability, ABILITY_RIDGE)
        ability = ability + step_J
        if max(np.abs(step_Q).max(), np.abs(step_J).max()) < TOLERANCE:
            break
    return easiness, ability


def _step(known: Array, seen: Array, easiness: Array, ability: Array, axis: int, pull: Array, ridge: float) -> Array:
    """A Newton step of the easiness (axis 1) or of the ability (axis 0)."""
    probability = sigmoid(easiness[:, None] + ability)
    gradient = (seen * (known - probability)).sum(axis) - pull
    curvature = (seen * probability * (1 - probability)).sum(axis) + ridge
    return np.asarray(np.clip(gradient / curvature, -1.0, 1.0))
