"""Logits -> probabilities, and thresholds for a target of share, quality or cost. numpy, no torch.

Shapes: N prompts, K pools cheapest first, G grid points of a curve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.logistic import fit_logistic, sigmoid

RULES = ("gain", "difficulty")
STAGES = ("full", "cheap")
GRID = 101
MIN_LABELS = 20  # fewer give a noisy Platt scaling


@dataclass(frozen=True, slots=True)
class Platt:
    """Platt scaling: p = sigmoid(slope * logit + offset). slope > 0, so it preserves the order."""

    slope: float = 1.0
    offset: float = 0.0


Stage = Mapping[str, tuple[Platt, ...]]  # one stage's calibration: by head, a Platt per pool


@dataclass(frozen=True, slots=True)
class Curve:
    """The effect of a rule at each threshold, on the prompts it was measured with. G rows, thresholds from 0 to 1.

    `shares[g][k]` is pool k's share of the calls; `quality[g]` the mean observed quality (None if no prompt has every
    pool's label). With one pool `shares[g][0]` is the share below the threshold, which goes to a more expensive pool.
    """

    thresholds: tuple[float, ...]  # from 0 to 1
    shares: tuple[tuple[float, ...], ...]
    quality: tuple[float, ...] | None
    all_large: float | None = None  # mean observed quality of the last pool; None: quality[-1]


@dataclass(frozen=True, slots=True)
class Familiarity:
    """How far predictions are trusted, by the distance of a prompt from the fitted ones (similarity.py).

    Beyond `far` a prompt is unfamiliar and each pool's quality is its mean; up to `near` it is what was predicted;
    between, the logits are interpolated.
    """

    near: float
    far: float
    means: tuple[float, ...]  # (K,) quality of the fitted prompts, in (0, 1)

    def trust(self, distances_B: NDArray[np.floating]) -> Array:
        """The predictions' part of the logits (B,), from 0 to 1."""
        width = max(self.far - self.near, 1e-6)
        trust: Array = np.clip((self.far - np.asarray(distances_B, np.float64)) / width, 0.0, 1.0)
        return trust


@dataclass(frozen=True, slots=True)
class Calibration:
    pools: tuple[str, ...]
    stages: Mapping[str, Stage]  # by STAGES
    curves: Mapping[str, Curve]  # by RULES, of the full stage
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # "large-share=0.3" -> rule -> threshold
    familiarity: Familiarity | None = None  # None: the model can't tell, or was fitted by a version that didn't

    def large_share(self, rule: str, threshold: float) -> float:
        """The usual share of the last, most expensive pool at a threshold."""
        curve = self._curve(rule)
        index = int(np.searchsorted(curve.thresholds, threshold, side="left"))
        if index == len(curve.thresholds):
            return 1.0  # a threshold above every confidence
        return curve.shares[index][-1]

    def threshold(
        self,
        rule: str,
        *,
        large_share: float | None = None,
        quality: float | None = None,
        cost: float | None = None,
        costs: Sequence[float] | None = None,
    ) -> float:
        """The threshold for one target.

        `large_share`: this share of the calls goes to the last pool. `quality`: the lowest threshold that keeps this
        fraction of the last pool's mean quality. `cost`: the highest threshold at which calls cost this fraction of
        sending everything to the last pool; requires each pool's cost. A share or quality that no threshold reaches
        gets 1: under gain, prompts whose first pool is best (confidence 1) always stay there.
        Raises ValueError for a cost that can't be met, and for an invalid target.
        """
        curve = self._curve(rule)
        thresholds, shares = np.array(curve.thresholds), np.array(curve.shares)
        given = [value for value in (large_share, quality, cost) if value is not None]
        if len(given) != 1 or not 0.0 <= given[0] <= 1.0:
            raise ValueError("give one target, large_share, quality or cost, between 0 and 1")
        if large_share is not None:
            return min(1.0, float(np.interp(large_share, shares[:, -1], thresholds)))
        if quality is not None:
            if curve.quality is None:
                raise ValueError("a quality target needs prompts with labels of every pool; calibrate on such a table")
            best = curve.quality[-1] if curve.all_large is None else curve.all_large
            reaching = np.flatnonzero(np.array(curve.quality) >= quality * best)
            return min(1.0, float(thresholds[reaching[0]])) if len(reaching) else 1.0
        if len(self.pools) == 1:
            raise ValueError("a cost target needs a checkpoint of two pools or more; this one has one")
        if costs is None or len(costs) != len(self.pools):
            raise ValueError(f"a cost target needs the cost of each of {', '.join(self.pools)}")
        relative = shares @ np.asarray(costs, float) / costs[-1]
        affordable = np.flatnonzero(relative <= cost)
        if not len(affordable):
            raise ValueError(
                f"cost={cost} can't be met: sending everything to {self.pools[0]} costs {relative.min():.3f}"
            )
        return min(1.0, float(thresholds[affordable[-1]]))

    def trusted(self, logits_BKH: NDArray[np.floating], distances_B: NDArray[np.floating]) -> Array:
        """Logits (B, K, H) of the full stage, with the quality of unfamiliar prompts drawn to its mean."""
        result = np.array(logits_BKH, np.float64)
        if self.familiarity is None:
            return result
        trust_B1 = self.familiarity.trust(distances_B)[:, None]
        platts = self.stages["full"]["quality"]
        mean_K = np.log(np.array(self.familiarity.means) / (1.0 - np.array(self.familiarity.means)))
        mean_K = (mean_K - [platt.offset for platt in platts]) / [platt.slope for platt in platts]
        result[:, :, QUALITY] = trust_B1 * result[:, :, QUALITY] + (1.0 - trust_B1) * mean_K
        return result

    def _curve(self, rule: str) -> Curve:
        if rule not in self.curves:
            raise ValueError(f"this checkpoint has no curve for the rule {rule!r}; it has {', '.join(self.curves)}")
        return self.curves[rule]


def calibrate_quality(stage: Stage, logits_NKH: NDArray[np.floating]) -> Array:
    """Logits (N, K, H) -> the calibrated quality (N, K)."""
    return _calibrate(stage["quality"], logits_NKH[:, :, QUALITY])


def calibrate_heads(stage: Stage, logits_NKH: NDArray[np.floating], heads: Sequence[str]) -> dict[str, Array]:
    """Logits (N, K, H) of these heads -> their calibrated predictions, (N, K) each."""
    return {head: _calibrate(stage[head], logits_NKH[:, :, index]) for index, head in enumerate(heads)}


def _calibrate(platts: Sequence[Platt], logits_NK: NDArray[np.floating]) -> Array:
    return np.stack([sigmoid(p.slope * logits_NK[:, k] + p.offset) for k, p in enumerate(platts)], 1)


def enough_labels(targets: NDArray[np.floating], weights: NDArray[np.floating]) -> bool:
    """Whether labels (N,), NaN where there is none, suffice for Platt scaling: MIN_LABELS or more, not all equal."""
    labelled = targets[~np.isnan(targets) & (weights > 0)]
    return len(labelled) >= MIN_LABELS and bool(np.ptp(labelled) > 0)


def fit_platt(logits: NDArray[np.floating], targets: NDArray[np.floating], weights: NDArray[np.floating]) -> Platt:
    """Weighted maximum likelihood; NaN targets are left out. Not enough labels: the identity.

    A ridge of one prompt towards slope 1, offset 0 keeps it finite where the labels are separable.
    """
    if not enough_labels(targets, weights):
        return Platt()
    seen = ~np.isnan(targets) & (weights > 0)
    x, t, w = np.asarray(logits, float)[seen], targets[seen], weights[seen]
    design = np.stack([x, np.ones_like(x)], 1)
    slope, offset = fit_logistic(design, t, w / w.mean(), prior=np.array([1.0, 0.0]), ridge=np.ones(2))
    return Platt(max(float(slope), 0.05), float(offset))


def confidence(quality_NK: Array, rule: str) -> Array:
    """How little is lost by serving from each pool (N, K), by one of the two rules."""
    if rule == "difficulty":
        return quality_NK
    if rule != "gain":
        raise ValueError(f"rule {rule!r} is unknown; use gain or difficulty")
    lost: Array = np.maximum(0.0, quality_NK.max(1, keepdims=True) - quality_NK)
    return 1.0 - lost


def route(quality_NK: Array, rule: str, threshold: float) -> NDArray[np.int64]:
    """The pool each prompt goes to (N,): the cheapest whose confidence is at least the threshold, else the last."""
    sure = confidence(quality_NK, rule) >= threshold
    sure[:, -1] = True
    chosen: NDArray[np.int64] = sure.argmax(1)
    return chosen


def measure_curve(quality_NK: Array, observed_NK: Array, weights: Array, rule: str) -> Curve:
    """Measures a rule on N prompts. The thresholds are the hundredths, as people write them, and quantiles of two
    confidences.

    These are the first pool's, which decides what leaves it, and the best of all pools but the last, which decides what
    reaches the last.
    """
    confidence_NK = confidence(quality_NK, rule)
    last = max(1, quality_NK.shape[1] - 1)
    decisive = (confidence_NK[:, 0], confidence_NK[:, :last].max(1))
    levels = [np.quantile(values, np.linspace(0, 1, GRID)) for values in decisive]
    thresholds = np.unique(np.concatenate([np.arange(GRID) / (GRID - 1), *levels]).clip(0.0, 1.0))
    total = weights.sum()
    if quality_NK.shape[1] == 1:
        unsure = [(float(weights[confidence_NK[:, 0] < threshold].sum() / total),) for threshold in thresholds]
        return Curve(tuple(map(float, thresholds)), tuple(unsure), None)
    complete = ~np.isnan(observed_NK).any(1) & (weights > 0)
    shares, qualities, all_large = [], [], None
    if complete.any():
        all_large = float(np.average(observed_NK[complete, -1], weights=weights[complete]))
    for threshold in thresholds:
        pool = route(quality_NK, rule, float(threshold))
        shares.append(tuple(float(weights[pool == k].sum() / total) for k in range(quality_NK.shape[1])))
        if complete.any():
            served = observed_NK[complete, pool[complete]]
            qualities.append(float(np.average(served, weights=weights[complete])))
    return Curve(tuple(map(float, thresholds)), tuple(shares), tuple(qualities) or None, all_large)


def dumps(calibration: Calibration) -> bytes:
    plain = asdict(calibration)
    if calibration.familiarity is None:
        del plain["familiarity"]
    return (json.dumps(plain, indent=1) + "\n").encode()


def loads(data: bytes) -> Calibration:
    """Parse calibration.json. Raises ValueError if it is not one."""
    try:
        raw = json.loads(data)
        stages = {
            name: {head: tuple(Platt(**p) for p in platts) for head, platts in raw["stages"][name].items()}
            for name in STAGES
        }
        curves = {
            rule: Curve(
                tuple(c["thresholds"]),
                tuple(tuple(row) for row in c["shares"]),
                None if c["quality"] is None else tuple(c["quality"]),
                c.get("all_large"),
            )
            for rule, c in raw["curves"].items()
        }
        familiarity = raw.get("familiarity")
        if familiarity is not None:
            familiarity = Familiarity(familiarity["near"], familiarity["far"], tuple(familiarity["means"]))
            if len(familiarity.means) != len(raw["pools"]) or not all(0 < mean < 1 for mean in familiarity.means):
                raise ValueError("calibration.json: familiarity needs a mean between 0 and 1 of each pool")
        return Calibration(tuple(raw["pools"]), stages, curves, raw["targets"], familiarity)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"calibration.json is not a calibration: {error!r}") from None
