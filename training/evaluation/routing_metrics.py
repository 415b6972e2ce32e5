"""How good is a routing? Pure functions over scores and observed outcomes.

A routing score is high where the large pool should serve. Taking prompts from the highest score down traces mean
quality over the share of large calls; APGR is the area under that curve as a fraction of the small-to-large gap.
Random is 0.5.

Scores of a cross-fit come from one model a fold. A model's general level is drawn away from the mean of the fold it was
not shown, so that ranking the folds' scores together as they are is worse than a coin where nothing was learned:
`centred` takes the folds' levels out.

Shapes: N prompts, K pools cheapest first, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.calibration import route

Array = NDArray[np.float64]
THRESHOLDS = (0.3, 0.5, 0.7, 0.75, 0.85, 0.95)


@dataclass(frozen=True, slots=True)
class Measured:
    """One score's APGR with its 95% bootstrap interval, and the paired difference against another score."""

    apgr: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float


def routing_scores(quality_NK: Array) -> dict[str, Array]:
    """What each rule orders prompts by: gain, what is lost by serving from the first pool; difficulty, its failure."""
    scores = {"difficulty": -quality_NK[:, 0]}
    if quality_NK.shape[1] > 1:
        scores["gain"] = quality_NK[:, 1:].max(1) - quality_NK[:, 0]
    return scores


def centred(score: Array, folds: NDArray[np.int64]) -> Array:
    """Scores (N,) less the mean of their fold (N,). Only for folds drawn at random: levels of whole groups do tell."""
    means = np.bincount(folds, score) / np.maximum(np.bincount(folds), 1)
    return np.asarray(np.round(score - means[folds], 9))  # or the mean's rounding error would rank a constant's folds


def share_curve(score: Array, small: Array, large: Array) -> tuple[Array, Array]:
    """(share of large calls, mean quality) from 0 to 1, straight across ties, as if they were taken in random order."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    gained = np.concatenate([[0.0], np.cumsum((large - small)[order])]) / len(score)
    corners = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    return corners / len(score), small.mean() + gained[corners]


def apgr(score: Array, small: Array, large: Array) -> float:
    """Area under share_curve over the gap. NaN where large is no better than small."""
    gap = float(large.mean() - small.mean())
    if gap <= 0:
        return float("nan")
    share, quality = share_curve(score, small, large)
    return (float(np.trapezoid(quality, share)) - float(small.mean())) / gap


def measure(
    scores: Mapping[str, Array],
    small: Array,
    large: Array,
    against: str = "length",
    groups: NDArray[np.int64] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Measured]:
    """APGR of each score, all on the same bootstrap resamples, so that differences are paired.

    Prompts are resampled, or, where groups 0 to G - 1 are given (N,), whole groups: prompts of a group are alike, and
    how well a score does on yet other groups varies with the groups there happen to be.
    """
    generator = np.random.default_rng(seed)
    groups = np.arange(len(small)) if groups is None else groups
    count = int(groups.max()) + 1
    drawn: dict[str, list[float]] = {name: [] for name in scores}
    for _ in range(resamples):
        times = np.bincount(generator.integers(0, count, count), minlength=count)
        rows = np.repeat(np.arange(len(small)), times[groups])
        for name, score in scores.items():
            drawn[name].append(apgr(score[rows], small[rows], large[rows]))
    point = {name: apgr(score, small, large) for name, score in scores.items()}
    measured = {}
    for name, values in drawn.items():
        low, high = _interval(np.array(values))
        difference_low, difference_high = _interval(np.array(values) - np.array(drawn[against]))
        measured[name] = Measured(point[name], low, high, point[name] - point[against], difference_low, difference_high)
    return measured


def _interval(values: Array) -> tuple[float, float]:
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def at_thresholds(
    quality_NK: Array, observed_NK: Array, rule: str, thresholds: Sequence[float] = THRESHOLDS
) -> list[dict[str, float]]:
    """Quality and large share at each threshold, and the coin's quality at the same share of each pool."""
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
    """Brier score and expected calibration error over equally full bins; NaN labels are left out.

    `weights` (N,): what each label counts for, 0 nothing.
    """
    w = np.ones(len(predicted)) if weights is None else weights
    seen = ~np.isnan(observed) & (w > 0)
    p, t, w = predicted[seen], observed[seen], w[seen]
    if not len(p):
        return {"brier": float("nan"), "ece": float("nan")}
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    ece = sum(abs(float(w[part] @ (p[part] - t[part]))) for part in parts) / w.sum()
    return {"brier": float(np.average((p - t) ** 2, weights=w)), "ece": float(ece)}


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table, its columns padded so that it reads well on a terminal too."""
    cells = [[*map(str, header)], *([*map(str, row)] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def apgr_table(measured: Mapping[str, Measured]) -> str:
    """Every score with its interval, and its paired difference against prompt length."""
    rows = [("random", "0.500", "", "")]
    for name, m in measured.items():
        against = "" if name == "length" else f"{m.difference:+.3f} [{m.difference_low:+.3f}, {m.difference_high:+.3f}]"
        rows.append((name, f"{m.apgr:.3f}", f"[{m.low:.3f}, {m.high:.3f}]", against))
    return table(rows, ("routing by", "APGR", "95% interval", "against prompt length, paired"))


def auroc(score: Array, positive: NDArray[np.bool_]) -> float:
    """The probability that a positive (N,) has a higher score (N,) than a negative, ties half (Mann-Whitney U).

    Needs one of each at least.
    """
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int(positive.sum())
    negatives = len(positive) - positives
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
