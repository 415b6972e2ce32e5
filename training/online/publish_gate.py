"""May a candidate be published? It is compared with the champion on the same held-out prompts, and with a coin. Pure.

Routing is compared by the area between the curve of mean quality over the share of large calls and the coin's straight
line, in units of quality: APGR is .5 plus that area over the gap between the pools. The area is linear in the gains, so
it needs no gap above 0, and where only the served pool has a label it takes the doubly robust gain: what candidate and
champion together expect of each pool, corrected by the label over its propensity (Dudik, Langford and Li, 2011).

Intervals are of a paired bootstrap over conversations, 95%.

Shapes: N prompts, K pools cheapest first, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.calibration import MIN_LABELS, confidence
from depo_gateway.estimator.standing import Standing
from depo_gateway.training.evaluation.routing_metrics import Array, calibration_error, centred
from depo_gateway.training.online.refresh_config import GateConfig

BINS = 10
RECENT, EVIDENCE, RESAMPLES = 300, 100, 1000  # of a standing
COIN_LEVEL = 0.8  # two-sided: a candidate beats the coin with 90% certainty
CLIP = 1e-3  # of a probability whose logarithm is taken
CELLS = 4_000_000  # of resamples times prompts at once: 32 MB an array


@dataclass(frozen=True, slots=True)
class Judged:
    """Prompts with labels that neither router was fitted on, and what each predicted of them."""

    pools: tuple[str, ...]  # (K,)
    candidate: Array  # (N, K) calibrated quality
    champion: Array | None  # (N, K); None: there is none, and a coin stands in
    observed: Array  # (N, K), NaN: no label
    trust: Array  # (N,) what each prompt counts, without inverse propensities
    served: NDArray[np.int64]  # (N,) the pool that served; -1: unknown
    inverse: Array  # (N,) 1 / propensity where only the served pool has a label, else 1
    folds: NDArray[np.int64] | None = None  # (N,) of the candidate's cross-fit
    new: NDArray[np.bool_] | None = None  # (N,) prompts that the champion was not fitted on; None: all
    calibrated: NDArray[np.bool_] | None = None  # (N,) prompts that calibration speaks of; None: all
    conversation: NDArray[np.int64] | None = None  # (N,) its number; intervals resample whole ones. None: each alone


@dataclass(frozen=True, slots=True)
class Verdict:
    publish: bool
    reasons: tuple[str, ...]  # why not; empty if it may be published
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Interval:
    point: float
    low: float
    high: float


def judge(newest: Judged, reference: Judged | None, config: GateConfig, seed: int = 0) -> Verdict:
    """The verdict on a candidate.

    Args:
        newest: the newest held-out prompts, the candidate's predictions cross-fitted and cross-calibrated.
        reference: a fixed set of prompts, or None.
    """
    labelled = int((~np.isnan(newest.observed).all(1) & (newest.trust > 0)).sum())
    short = [pool for k, pool in enumerate(newest.pools) if (~np.isnan(newest.observed[:, k])).sum() < MIN_LABELS]
    if labelled < config.least:
        reason = f"{labelled} newest prompts have labels, and it takes {config.least} to tell harm from noise"
        return Verdict(False, (reason,), {"newest": {"prompts": labelled}})
    if short:
        reason = f"pool {short[0]!r} has fewer than {MIN_LABELS} labels on the newest prompts"
        return Verdict(False, (reason,), {"newest": {"prompts": labelled}})
    reasons: list[str] = []
    figures: dict[str, Any] = {}
    rival = "the champion" if newest.champion is not None else "a coin"
    area, loss, figures["newest"] = compare(newest, config, seed)
    if area.high < 0:
        reasons.append(
            f"it routes the newest prompts worse than {rival}: {area.point:+.4f} [{area.low:+.4f}, {area.high:+.4f}]"
            " of quality, averaged over all shares"
        )
    elif area.point <= 0 and loss.high >= 0:
        reasons.append(
            f"it is no better than {rival} on the newest prompts: {area.point:+.4f} of quality, averaged over all"
            f" shares, and {loss.point:+.4f} of held-out loss"
        )
    coin = replace(newest, champion=None, new=None)
    own, _, _ = compare(coin, config, seed, COIN_LEVEL)
    figures["over_coin"] = [own.point, own.low, own.high]
    if own.low <= 0 and not area.high < 0:
        reasons.append(
            f"it is not shown to route better than a coin: {own.point:+.4f} [{own.low:+.4f}, {own.high:+.4f}] of"
            " quality, averaged over all shares"
        )
    if reference is not None:
        area, _, figures["reference"] = compare(reference, config, seed)
        if area.high < 0:
            reasons.append(
                f"it routes the reference set worse than {rival}: {area.point:+.4f} [{area.low:+.4f}, {area.high:+.4f}]"
                " of quality, averaged over all shares"
            )
    errors, bounds = calibration_of(newest, config)
    figures |= {"calibration_error": errors, "calibration_bound": bounds}
    for name, error in errors.items():
        if error > bounds[name]:
            what = "the gain" if name == "gain" else f"the quality of pool {name!r}"
            reasons.append(f"the calibration error of {what} is {error:.3f}, above its bound {bounds[name]:.3f}")
    sure = confidence(newest.candidate, "gain")[:, 0]
    low, high = np.percentile(sure, [5, 95])
    figures["spread"] = float(high - low)
    if not high - low >= config.spread:
        reasons.append(
            f"it is a near-constant router: confidence spreads over {high - low:.4f}, less than {config.spread:g}"
        )
    return Verdict(not reasons, tuple(reasons), figures)


def compare(
    judged: Judged, config: GateConfig, seed: int, level: float = 0.95
) -> tuple[Interval, Interval, dict[str, Any]]:
    """(candidate minus champion: routing area; held-out log-loss; all figures). Area: higher is better, loss: lower.

    On prompts new to the champion. If these are too few it is on all, and the champion looks better than it is: then a
    refusal comes too easily, never too hard.
    """
    rival = judged.champion if judged.champion is not None else _constant(judged)
    some = ~np.isnan(judged.observed).all(1) & (judged.trust > 0)
    if judged.new is not None and (some & judged.new).sum() >= config.least:
        some &= judged.new
    both = some & ~np.isnan(judged.observed[:, [0, -1]]).any(1)
    complete = int(both.sum()) >= config.least
    rows = np.flatnonzero(both if complete else some)
    gain = gains(judged, rival)[rows]
    trust = judged.trust[rows]
    conversation = None if judged.conversation is None else judged.conversation[rows]
    times_RN = resampled(len(rows), config.resamples, seed, conversation) * trust
    own_score, rival_score = score_of(judged.candidate, judged.folds)[rows], score_of(rival, None)[rows]
    own, other = (area_over_coin(score, gain, times_RN) for score in (own_score, rival_score))
    points = [float(area_over_coin(score, gain, trust[None])[0]) for score in (own_score, rival_score)]
    losses = [log_loss(quality, judged.observed)[rows] for quality in (judged.candidate, rival)]
    difference = losses[0] - losses[1]
    weighted = judged.inverse[rows] * trust
    loss = interval(
        float(np.average(difference, weights=weighted)),
        (times_RN * judged.inverse[rows]) @ difference / (times_RN @ judged.inverse[rows]),
        level,
    )
    area = interval(points[0] - points[1], own - other, level)
    gap = float(np.average(gain, weights=trust))
    figures: dict[str, Any] = {
        "prompts": len(rows),
        "all_labels": complete,
        "gap": gap,
        "area": points[0],
        "rival_area": points[1],
        "area_difference": [area.point, area.low, area.high],
        "loss_difference": [loss.point, loss.low, loss.high],
    }
    if gap > 0:
        figures |= {"apgr": 0.5 + points[0] / gap, "rival_apgr": 0.5 + points[1] / gap}
    return area, loss, figures


def score_of(quality_NK: Array, folds: NDArray[np.int64] | None) -> Array:
    """What the rule gain orders prompts by, a cross-fit's centred by fold."""
    score: Array = quality_NK[:, 1:].max(1) - quality_NK[:, 0]
    return score if folds is None else centred(score, folds)


def gains(judged: Judged, rival: Array) -> Array:
    """The last pool's quality minus the first's (N,): observed, or doubly robust where a label is missing."""
    expected = (judged.candidate + rival) / 2  # of both alike, so that it favours neither
    value = expected.copy()
    for k in range(value.shape[1]):
        seen = ~np.isnan(judged.observed[:, k])
        residual = np.where(seen, judged.observed[:, k] - expected[:, k], 0.0)
        value[:, k] += residual * np.where(judged.served == k, judged.inverse, 1.0)
    gain: Array = value[:, -1] - value[:, 0]
    return gain


def area_over_coin(score: Array, gain: Array, times_RN: Array) -> Array:
    """Mean quality over all shares of large calls, minus the coin's: (R,), one for each weighting of the prompts.

    Ties are taken in random order.
    """
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    ends = np.flatnonzero(np.concatenate([ordered[1:] != ordered[:-1], [True]]))
    areas = np.empty(len(times_RN))
    step = max(1, CELLS // max(1, len(score)))
    for start in range(0, len(times_RN), step):
        times = times_RN[start : start + step, order]
        total = times.sum(1, keepdims=True)
        share = np.cumsum(times, 1)[:, ends] / total
        gained = np.cumsum(times * gain[order], 1)[:, ends] / total
        zero = np.zeros((len(times), 1))
        share, gained = np.concatenate([zero, share], 1), np.concatenate([zero, gained], 1)
        areas[start : start + step] = np.trapezoid(gained, share, axis=1) - gained[:, -1] / 2
    return areas


def resampled(count: int, resamples: int, seed: int, units: NDArray[np.int64] | None = None) -> Array:
    """How often each of `count` prompts is drawn in each resample (R, N); those of one unit (N,) together."""
    unit_N = np.arange(count) if units is None else np.unique(units, return_inverse=True)[1]
    drawn = int(unit_N.max()) + 1
    generator = np.random.default_rng(seed)
    times: Array = generator.multinomial(drawn, np.full(drawn, 1 / drawn), resamples).astype(float)[:, unit_N]
    return times


def interval(point: float, drawn: Array, level: float = 0.95) -> Interval:
    low, high = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)])
    return Interval(point, float(low), float(high))


def log_loss(quality_NK: Array, observed_NK: Array) -> Array:
    """Mean over the labels of each prompt (N,); NaN where it has none."""
    p = quality_NK.clip(CLIP, 1 - CLIP)
    loss = -(observed_NK * np.log(p) + (1 - observed_NK) * np.log(1 - p))
    seen = ~np.isnan(loss)
    mean: Array = np.where(seen, loss, 0.0).sum(1) / np.where(seen.any(1), seen.sum(1), np.nan)
    return mean


def calibration_of(judged: Judged, config: GateConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Calibration error of each pool's quality, by its name, and of the gain, and each one's bound."""
    trusted = (judged.trust > 0) & (True if judged.calibrated is None else judged.calibrated)
    observed, predicted = judged.observed[trusted], judged.candidate[trusted]
    columns = {pool: (predicted[:, k], observed[:, k]) for k, pool in enumerate(judged.pools)}
    gain = observed[:, -1] - observed[:, 0]
    if (~np.isnan(gain)).sum() >= config.least:
        columns["gain"] = (predicted[:, -1] - predicted[:, 0], gain)
    errors = {name: calibration_error(p, t, BINS)["ece"] for name, (p, t) in columns.items()}
    bounds = {name: config.calibration_error + by_chance(p, t) for name, (p, t) in columns.items()}
    return errors, bounds


def by_chance(predicted: Array, observed: Array, bins: int = BINS) -> float:
    """The calibration error that perfect probabilities stay below 19 times in 20, with so many labels that vary so."""
    seen = ~np.isnan(observed)
    p, residual = predicted[seen], (observed - predicted)[seen]
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    share = np.array([len(part) / len(p) for part in parts])
    noise = np.array([residual[part].std() / max(1, len(part) - 1) ** 0.5 for part in parts])
    mean = float(share @ noise) * math.sqrt(2 / math.pi)  # of |normal|
    deviation = float(np.sqrt((share**2) @ (noise**2) * (1 - 2 / np.pi)))
    return mean + 1.645 * deviation


def _constant(judged: Judged) -> Array:
    """A coin's predictions: each pool's mean label."""
    return np.tile(np.nanmean(judged.observed, 0), (len(judged.observed), 1))


def standing_of(
    version: str, time: float, quality: Array, observed: Array, folds: NDArray[np.int64] | None, large_share: float
) -> Standing | None:
    """How a router does on recent prompts with labels of every pool, which it was not fitted on; None without any.

    The advantage over a coin at the same share of each pool is the mean over all shares. `beats_random` is False only
    on evidence: of EVIDENCE labels the one-sided 90% upper bound is 0 or less, or of three times as many the estimate.
    """
    rows = np.flatnonzero(~np.isnan(observed[:, [0, -1]]).any(1))[-RECENT:]
    if not len(rows):
        return None
    gain = observed[rows, -1] - observed[rows, 0]
    score = score_of(quality, folds)[rows]
    point = float(area_over_coin(score, gain, np.ones((1, len(rows))))[0])
    found = interval(point, area_over_coin(score, gain, resampled(len(rows), RESAMPLES, 0)), 0.8)
    no_better = (len(rows) >= EVIDENCE and found.high <= 0) or (len(rows) >= 3 * EVIDENCE and point <= 0)
    return Standing(version, time, len(rows), point, found.low, found.high, not no_better, large_share)
