"""Metrics of a routing: pure functions over scores and observed outcomes.

A routing score is high where the large pool should serve. Taking prompts from the highest score down traces mean
quality over the share of large calls; APGR is the area under that curve as a fraction of the small-to-large gap.
Random routing has 0.5.

Scores of a cross-fit come from one model per fold. A model's mean score moves away from the mean of the fold that was
held out of it, so that ranking all folds' scores together without correction is worse than random where nothing was
learned: `centre_by_fold` subtracts each fold's mean.

Shapes: N prompts, K pools cheapest first, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import route
from depo_gateway.training.evaluation.bootstrap import DEFAULT_RESAMPLES, draw_counts, percentile_interval

THRESHOLDS = (0.3, 0.5, 0.7, 0.75, 0.85, 0.95)


@dataclass(frozen=True, slots=True)
class ApgrEstimate:
    """One score's APGR with its 95% bootstrap interval, and the paired difference from another score."""

    apgr: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float


def routing_scores(quality_NK: Array) -> dict[str, Array]:
    """What each rule ranks prompts by: gain, the quality lost in the first pool; difficulty, that pool's failure."""
    scores = {"difficulty": -quality_NK[:, 0]}
    if quality_NK.shape[1] > 1:
        scores["gain"] = quality_NK[:, 1:].max(1) - quality_NK[:, 0]
    return scores


def centre_by_fold(score: Array, folds: NDArray[np.int64]) -> Array:
    """Scores (N,) minus the mean of their fold (N,). Only for random folds: means of whole groups are information."""
    means = np.bincount(folds, score) / np.maximum(np.bincount(folds), 1)
    # Unrounded, the means' rounding errors would rank the folds of a constant score.
    return np.asarray(np.round(score - means[folds], 9))


def share_curve(score: Array, small: Array, large: Array) -> tuple[Array, Array]:
    """(share of large calls, mean quality) from 0 to 1, linear across ties: the mean over their random orders."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    gained = np.concatenate([[0.0], np.cumsum((large - small)[order])]) / len(score)
    corners = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    return corners / len(score), small.mean() + gained[corners]


def apgr(score: Array, small: Array, large: Array) -> float:
    """Area under share_curve, as a fraction of the gap. NaN where large is no better than small."""
    gap = float(large.mean() - small.mean())
    if gap <= 0:
        return float("nan")
    share, quality = share_curve(score, small, large)
    return (float(np.trapezoid(quality, share)) - float(small.mean())) / gap


def measure_apgr(
    scores: Mapping[str, Array],
    small: Array,
    large: Array,
    against: str = "length",
    groups: NDArray[np.int64] | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> dict[str, ApgrEstimate]:
    """APGR of each score, all on the same bootstrap resamples, so that differences from `against` are paired.

    Prompts are resampled, or whole groups where `groups` (N,), 0 to G - 1, are given: prompts of a group are similar,
    and the interval must cover how much a score varies between groups.
    """
    groups = np.arange(len(small)) if groups is None else groups
    draws: dict[str, list[float]] = {name: [] for name in scores}
    for times in draw_counts(int(groups.max()) + 1, resamples, np.random.default_rng(seed)):
        rows = np.repeat(np.arange(len(small)), times[groups])
        for name, score in scores.items():
            draws[name].append(apgr(score[rows], small[rows], large[rows]))
    point = {name: apgr(score, small, large) for name, score in scores.items()}
    return {
        name: ApgrEstimate(
            point[name],
            *percentile_interval(np.array(values)),
            point[name] - point[against],
            *percentile_interval(np.array(values) - np.array(draws[against])),
        )
        for name, values in draws.items()
    }


def at_thresholds(
    quality_NK: Array, observed_NK: Array, rule: str, thresholds: Sequence[float] = THRESHOLDS
) -> list[dict[str, float]]:
    """Quality and large share at each threshold, and the quality of random routing (`coin`) at the same shares."""
    rows = []
    for threshold in thresholds:
        pool = route(quality_NK, rule, threshold)
        shares = np.bincount(pool, minlength=quality_NK.shape[1]) / len(pool)
        rows.append(
            {
                "threshold": threshold,
                "large_share": float(shares[-1]),
                "quality": float(observed_NK[np.arange(len(pool)), pool].mean()),
                "coin": float(shares @ observed_NK.mean(0)),
            }
        )
    return rows


def calibration_error(
    predicted: Array, observed: Array, bins: int = 10, weights: Array | None = None
) -> dict[str, float]:
    """Brier score and calibration errors over bins of equal size; NaN labels are left out.

    `ece` is the mean absolute difference between a bin's mean prediction and mean label. It is above 0 even for perfect
    predictions, by the sampling of the labels. `debiased` is the root mean square of these differences less what the
    sampling adds (Kumar, Liang and Ma 2019, arXiv 1909.10155); 0 where that is all. `weights` (N,): of each label; a
    label of weight 0 is left out.
    """
    w = np.ones(len(predicted)) if weights is None else weights
    seen = ~np.isnan(observed) & (w > 0)
    p, t, w = predicted[seen], observed[seen], w[seen]
    if not len(p):
        return {"brier": float("nan"), "ece": float("nan"), "debiased": float("nan")}
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    ece = sum(abs(float(w[part] @ (p[part] - t[part]))) for part in parts) / w.sum()
    squared = sum(float(w[part].sum()) * _squared_bias(t[part] - p[part], w[part]) for part in parts) / w.sum()
    return {
        "brier": float(np.average((p - t) ** 2, weights=w)),
        "ece": float(ece),
        "debiased": float(np.sqrt(max(0.0, squared))),
    }


def _squared_bias(residual: Array, weights: Array) -> float:
    """The squared weighted mean of residuals (n,), less the variance of that mean; it may be negative."""
    share = weights / weights.sum()
    mean = float(share @ residual)
    squares = float(share @ share)
    if squares >= 1.0:  # a single label has no variance to subtract
        return mean**2
    variance = float(share @ (residual - mean) ** 2) / (1 - squares)
    return mean**2 - variance * squares


def auroc(score: Array, positive: NDArray[np.bool_]) -> float:
    """The probability that a positive (N,) has a higher score (N,) than a negative, ties half (Mann-Whitney U).

    There must be at least one of each.
    """
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int(positive.sum())
    negatives = len(positive) - positives
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
