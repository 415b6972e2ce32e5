"""Chooses by cross-validation whether a fit uses the prior from other models' outcomes.

Shapes: N own examples, K pools, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import Item

# With few labels a difference is uncertain, and nearly always the prior helps: it is dropped where it is shown to hurt
MOST_ERRORS = 1.0


@dataclass(frozen=True, slots=True)
class PriorChoice:
    """Whether the prior is used, and the comparison that says so."""

    used: bool
    models: int
    further_questions: int  # of the prior, which the own tables don't have
    known_questions: int  # own ones that the prior has
    loss: float  # mean held-out cross-entropy of all pools' qualities, with the prior
    loss_without: float
    standard_error: float  # of the paired difference


def compare_losses(with_prior_NKH: Array, without_NKH: Array, items: Sequence[Item]) -> tuple[float, float, float]:
    """(loss with the prior, loss without, standard error of their paired difference) of held-out logits."""
    losses = [_cross_entropy(logits, items) for logits in (with_prior_NKH, without_NKH)]
    weights = np.array([item.weight for item in items])
    known = ~np.isnan(losses[0])
    weights = weights[known] / weights[known].sum()
    difference = (losses[0] - losses[1])[known]
    mean = float(weights @ difference)
    error = float(np.sqrt((weights**2) @ (difference - mean) ** 2))
    return float(weights @ losses[0][known]), float(weights @ losses[1][known]), error


def is_used(loss: float, loss_without: float, standard_error: float) -> bool:
    """Whether the loss with the prior is lower, or higher by no more than MOST_ERRORS standard errors."""
    return loss - loss_without <= MOST_ERRORS * standard_error


def prior_text(choice: PriorChoice) -> str:
    """The choice and its reason, in words."""
    of = (
        f"{choice.models} other models, {choice.further_questions:,} questions besides yours"
        f" ({choice.known_questions:,} of yours known to it)"
    )
    figures = (
        f"held-out cross-entropy {choice.loss:.4f} with it, {choice.loss_without:.4f} without;"
        f" standard error of the difference {choice.standard_error:.4f}"
    )
    if choice.used:
        return f"Prior used: {of}; {figures}\n"
    return f"Prior not used, because it makes held-out predictions worse: {of}; {figures}\n"


def _cross_entropy(logits_NKH: Array, items: Sequence[Item]) -> Array:
    """Cross-entropy of each example's qualities (N,), summed over the pools that have a label; NaN: none has."""
    logits, observed = logits_NKH[:, :, QUALITY], np.array([item.quality for item in items])
    error = np.logaddexp(0.0, logits) - observed * logits
    return np.where(np.isnan(error).all(1), np.nan, np.nansum(error, axis=1))
