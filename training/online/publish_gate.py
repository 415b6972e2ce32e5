"""The publish gate: compares a candidate with the champion and with random routing, on the same held-out prompts. Pure.

Routing is compared by an area, in units of quality: between the curve of mean quality over the share of large calls and
the straight line of random routing. APGR is .5 plus that area over the gap between the pools. The area is linear in the
gains, so it does not require a gap above 0. Where only the served pool has a label, it takes the doubly robust gain:
the mean prediction of candidate and champion, corrected by the label over its propensity (Dudik, Langford and Li,
2011).

Intervals are 95% of a paired bootstrap over conversations.

Shapes: N prompts, K pools cheapest first, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import MIN_LABELS, confidence
from depo_gateway.training.evaluation.bootstrap import draw_count_matrix, percentile_interval
from depo_gateway.training.evaluation.routing_metrics import calibration_error, centre_by_fold
from depo_gateway.training.online.refresh_config import GateConfig

CALIBRATION_BINS = 10
RANDOM_LEVEL = 0.8  # two-sided: a candidate beats random routing with 90% confidence
LOG_CLIP = 1e-3  # of a probability whose logarithm is taken
LARGEST_ARRAY = 4_000_000  # resamples times prompts at once: 32 MB an array


@dataclass(frozen=True, slots=True)
class Holdout:
    """Prompts with labels that neither router was fitted on, and each router's predictions."""

    pools: tuple[str, ...]  # (K,)
    candidate: Array  # (N, K) calibrated quality
    champion: Array | None  # (N, K); None: there is none, and random routing takes its place
    observed: Array  # (N, K), NaN: no label
    trust: Array  # (N,) each prompt's weight, without inverse propensities
    served: NDArray[np.int64]  # (N,) the pool that served; -1: unknown
    inverse: Array  # (N,) 1 / propensity where only the served pool has a label, else 1
    folds: NDArray[np.int64] | None = None  # (N,) of the candidate's cross-fit
    new: NDArray[np.bool_] | None = None  # (N,) prompts that the champion was not fitted on; None: all
    calibrated: NDArray[np.bool_] | None = None  # (N,) prompts that the candidate is calibrated on; None: all
    conversation: NDArray[np.int64] | None = None  # (N,) its number; intervals resample whole ones. None: each alone


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate may be published."""

    publish: bool
    reasons: tuple[str, ...]  # why not; empty if it may be published
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Interval:
    point: float
    low: float
    high: float


def assess(newest: Holdout, reference: Holdout | None, config: GateConfig, seed: int = 0) -> Verdict:
    """The verdict on a candidate.

    Args:
        newest: the newest held-out prompts, the candidate's predictions cross-fitted and cross-calibrated.
        reference: a fixed set of prompts, or None.
    """
    labelled = int((~np.isnan(newest.observed).all(1) & (newest.trust > 0)).sum())
    if reason := _too_few_labels(newest, labelled, config):
        return Verdict(False, (reason,), {"newest": {"prompts": labelled}})
    figures: dict[str, Any] = {}
    reasons = [
        *_routing_reasons(newest, config, seed, figures),
        *_reference_reasons(newest, reference, config, seed, figures),
        *_calibration_reasons(newest, config, figures),
        *_spread_reasons(newest, config, figures),
    ]
    return Verdict(not reasons, tuple(reasons), figures)


def _too_few_labels(newest: Holdout, labelled: int, config: GateConfig) -> str:
    if labelled < config.least:
        return f"{labelled} newest prompts have labels, and {config.least} are required to distinguish harm from noise"
    for k, pool in enumerate(newest.pools):
        if (~np.isnan(newest.observed[:, k])).sum() < MIN_LABELS:
            return f"pool {pool!r} has fewer than {MIN_LABELS} labels on the newest prompts"
    return ""


def _routing_reasons(newest: Holdout, config: GateConfig, seed: int, figures: dict[str, Any]) -> list[str]:
    """Against the champion and against random routing, on the newest prompts."""
    reasons = []
    rival = _rival(newest)
    area, loss, figures["newest"] = compare(newest, config, seed)
    if area.high < 0:
        reasons.append(f"it routes the newest prompts worse than {rival}: {_of_quality(area)}")
    elif area.point <= 0 and loss.high >= 0:
        reasons.append(
            f"it is no better than {rival} on the newest prompts: mean quality {area.point:+.4f}, held-out loss"
            f" {loss.point:+.4f}"
        )
    own, _, _ = compare(replace(newest, champion=None, new=None), config, seed, RANDOM_LEVEL)
    figures["over_coin"] = [own.point, own.low, own.high]
    if own.low <= 0 and not area.high < 0:
        reasons.append(f"it is not shown to route better than random routing: {_of_quality(own)}")
    return reasons


def _reference_reasons(
    newest: Holdout, reference: Holdout | None, config: GateConfig, seed: int, figures: dict[str, Any]
) -> list[str]:
    if reference is None:
        return []
    area, _, figures["reference"] = compare(reference, config, seed)
    if not area.high < 0:
        return []
    return [f"it routes the reference set worse than {_rival(newest)}: {_of_quality(area)}"]


def _calibration_reasons(newest: Holdout, config: GateConfig, figures: dict[str, Any]) -> list[str]:
    errors, bounds = calibration_of_holdout(newest, config)
    figures |= {"calibration_error": errors, "calibration_bound": bounds}
    reasons = []
    for name, error in errors.items():
        if error > bounds[name]:
            what = "the gain" if name == "gain" else f"the quality of pool {name!r}"
            reasons.append(f"the calibration error of {what} is {error:.3f}, above its bound {bounds[name]:.3f}")
    return reasons


def _spread_reasons(newest: Holdout, config: GateConfig, figures: dict[str, Any]) -> list[str]:
    low, high = np.percentile(confidence(newest.candidate, "gain")[:, 0], [5, 95])
    figures["spread"] = float(high - low)
    if high - low >= config.spread:
        return []
    return [f"it is a near-constant router: confidence spreads over {high - low:.4f}, less than {config.spread:g}"]


def _rival(holdout: Holdout) -> str:
    return "the champion" if holdout.champion is not None else "random routing"


def _of_quality(area: Interval) -> str:
    return f"mean quality {area.point:+.4f} [{area.low:+.4f}, {area.high:+.4f}]"


def compare(
    holdout: Holdout, config: GateConfig, seed: int, level: float = 0.95
) -> tuple[Interval, Interval, dict[str, Any]]:
    """(candidate minus champion: routing area; held-out log-loss; all figures). Area: higher is better, loss: lower.

    On prompts new to the champion. If these are too few all count, and the champion's results are optimistic: then the
    gate refuses too often, but never too seldom.
    """
    rival = holdout.champion if holdout.champion is not None else _mean_labels(holdout)
    some = ~np.isnan(holdout.observed).all(1) & (holdout.trust > 0)
    if holdout.new is not None and (some & holdout.new).sum() >= config.least:
        some &= holdout.new
    both = some & ~np.isnan(holdout.observed[:, [0, -1]]).any(1)
    complete = int(both.sum()) >= config.least
    rows = np.flatnonzero(both if complete else some)
    gain = gains(holdout, rival)[rows]
    trust = holdout.trust[rows]
    conversation = None if holdout.conversation is None else holdout.conversation[rows]
    times_RN = resampled(len(rows), config.resamples, seed, conversation) * trust
    own_score, rival_score = routing_score(holdout.candidate, holdout.folds)[rows], routing_score(rival, None)[rows]
    own, other = (area_over_random(score, gain, times_RN) for score in (own_score, rival_score))
    points = [float(area_over_random(score, gain, trust[None])[0]) for score in (own_score, rival_score)]
    losses = [log_loss(quality, holdout.observed)[rows] for quality in (holdout.candidate, rival)]
    difference = losses[0] - losses[1]
    weighted = holdout.inverse[rows] * trust
    loss = bootstrap_interval(
        float(np.average(difference, weights=weighted)),
        (times_RN * holdout.inverse[rows]) @ difference / (times_RN @ holdout.inverse[rows]),
        level,
    )
    area = bootstrap_interval(points[0] - points[1], own - other, level)
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


def routing_score(quality_NK: Array, folds: NDArray[np.int64] | None) -> Array:
    """The score by which the rule gain orders prompts (N,); of a cross-fit, centred by fold."""
    score: Array = quality_NK[:, 1:].max(1) - quality_NK[:, 0]
    return score if folds is None else centre_by_fold(score, folds)


def gains(holdout: Holdout, rival: Array) -> Array:
    """The last pool's quality minus the first's (N,): observed, or doubly robust where a label is missing."""
    expected = (holdout.candidate + rival) / 2  # the mean favours neither
    value = expected.copy()
    for k in range(value.shape[1]):
        seen = ~np.isnan(holdout.observed[:, k])
        residual = np.where(seen, holdout.observed[:, k] - expected[:, k], 0.0)
        value[:, k] += residual * np.where(holdout.served == k, holdout.inverse, 1.0)
    gain: Array = value[:, -1] - value[:, 0]
    return gain


def area_over_random(score: Array, gain: Array, times_RN: Array) -> Array:
    """Mean quality over all shares of large calls, minus random routing's: (R,), one for each weighting of the prompts.

    Ties are taken in random order.
    """
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    ends = np.flatnonzero(np.concatenate([ordered[1:] != ordered[:-1], [True]]))
    areas = np.empty(len(times_RN))
    step = max(1, LARGEST_ARRAY // max(1, len(score)))
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
    return draw_count_matrix(drawn, resamples, np.random.default_rng(seed))[:, unit_N]


def bootstrap_interval(point: float, drawn: Array, level: float = 0.95) -> Interval:
    return Interval(point, *percentile_interval(drawn, 50 * (1 - level)))


def log_loss(quality_NK: Array, observed_NK: Array) -> Array:
    """Mean over the labels of each prompt (N,); NaN where it has none."""
    p = quality_NK.clip(LOG_CLIP, 1 - LOG_CLIP)
    loss = -(observed_NK * np.log(p) + (1 - observed_NK) * np.log(1 - p))
    seen = ~np.isnan(loss)
    mean: Array = np.where(seen, loss, 0.0).sum(1) / np.where(seen.any(1), seen.sum(1), np.nan)
    return mean


def calibration_of_holdout(holdout: Holdout, config: GateConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Calibration error of each pool's quality, by its name, and of the gain, and each one's bound."""
    trusted = (holdout.trust > 0) & (True if holdout.calibrated is None else holdout.calibrated)
    observed, predicted = holdout.observed[trusted], holdout.candidate[trusted]
    columns = {pool: (predicted[:, k], observed[:, k]) for k, pool in enumerate(holdout.pools)}
    gain = observed[:, -1] - observed[:, 0]
    if (~np.isnan(gain)).sum() >= config.least:
        columns["gain"] = (predicted[:, -1] - predicted[:, 0], gain)
    errors = {name: calibration_error(p, t, CALIBRATION_BINS)["ece"] for name, (p, t) in columns.items()}
    bounds = {name: config.calibration_error + chance_error(p, t) for name, (p, t) in columns.items()}
    return errors, bounds


def chance_error(predicted: Array, observed: Array, bins: int = CALIBRATION_BINS) -> float:
    """95th percentile of the calibration error of perfect probabilities, with as many labels of the same variance."""
    seen = ~np.isnan(observed)
    p, residual = predicted[seen], (observed - predicted)[seen]
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    share = np.array([len(part) / len(p) for part in parts])
    noise = np.array([residual[part].std() / max(1, len(part) - 1) ** 0.5 for part in parts])
    mean = float(share @ noise) * math.sqrt(2 / math.pi)  # of |normal|
    deviation = float(np.sqrt((share**2) @ (noise**2) * (1 - 2 / np.pi)))
    return mean + 1.645 * deviation


def _mean_labels(holdout: Holdout) -> Array:
    """The predictions that are used as random routing: each pool's mean label."""
    return np.tile(np.nanmean(holdout.observed, 0), (len(holdout.observed), 1))
