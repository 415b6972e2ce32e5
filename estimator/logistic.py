"""Logistic regression: one penalised maximum-likelihood fit by Newton's method. numpy only.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array


def sigmoid(x: NDArray[np.floating]) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0))), np.float64)


def fit_logistic(
    design_NP: Array,
    targets: Array,
    weights: Array,
    prior: Array,
    ridge: Array,
    steps: int = 50,
    longest: float = 1.0,
    tolerance: float = 1e-8,
) -> Array:
    """The coefficients (P,) that maximise the weighted likelihood of `targets` (N,), in [0, 1].

    A Gaussian prior, in prompts, pulls each coefficient to `prior` (P,) with strength `ridge` (P,). It keeps the fit
    finite where the labels are separable; the fit begins there. The caller leaves out rows without a target.

    Args:
        longest: the most that a coefficient moves in one step; infinity: plain Newton steps.
        tolerance: the fit ends after a step in which no coefficient moved by as much; 0: after all steps.
    """
    beta = prior.copy()
    for _ in range(steps):
        p = sigmoid(design_NP @ beta)
        gradient = design_NP.T @ (weights * (targets - p)) - ridge * (beta - prior)
        curvature = (design_NP * (weights * p * (1 - p))[:, None]).T @ design_NP + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        largest = float(np.abs(step).max())
        beta += step / max(1.0, largest / longest)
        if largest < tolerance:
            break
    return beta
