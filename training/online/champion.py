"""What a refresh stands on: the champion, which is served now and to be beaten, and the base. Torch.

Shapes: N examples, K pools cheapest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from depo_gateway.estimator import checkpoint, model
from depo_gateway.estimator.calibration import Calibration, apply_calibration
from depo_gateway.estimator.calibration import loads as calibration_of
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.model import Estimator
from depo_gateway.estimator.records.types import Labelled
from depo_gateway.training.evaluation.contamination import known_of
from depo_gateway.training.evaluation.routing_metrics import Array
from depo_gateway.training.evaluation.targets import parse_target, thresholds_of
from depo_gateway.training.online.cross_fit import Start, learner_config, renamed
from depo_gateway.training.online.refresh_config import RefreshConfig
from depo_gateway.training.outcomes.traffic_examples import Traffic


@dataclass(frozen=True, slots=True)
class Known:
    """A checkpoint, its pools called as the traffic's are."""

    name: str  # champion | base
    manifest: Manifest
    estimator: Estimator
    tokenizer: Tokenizer
    calibration: Calibration

    @property
    def start(self) -> Start:
        return Start(self.name, self.estimator, self.tokenizer, False)


@dataclass(frozen=True, slots=True)
class Standpoint:
    """Where a refresh stands before it learns."""

    pools: tuple[str, ...]  # that the candidate will score
    base: Known  # its encoder is the candidate's
    champion: Known | None  # None: nothing is served yet
    cold: bool  # of the base nothing but the encoder is used

    @property
    def parent(self) -> str:
        return (self.champion or self.base).manifest.version


def standpoint_of(base: Path, out: Path, cold: bool, labelled: Sequence[Labelled]) -> Standpoint:
    """Load what there is: the champion is what `out/current` names or, unless cold, the base.

    Raises ValueError where the records know a pool that the champion does not score.
    """
    pools = pools_of_traffic(labelled)
    began = load("base", base, pools)
    champion: Known | None = None if cold else began
    if (out / "current").is_file():
        champion = load("champion", out, pools)
        began = champion if champion.manifest.version == began.manifest.version else began
    known = pools if champion is None else champion.estimator.config.pools
    if champion is not None and (other := [pool for pool in pools if pool not in known]):
        raise ValueError(
            f"the records know the pool {other[0]!r}, but the checkpoint scores {', '.join(known)}; give a --base for"
            " these pools, or --cold and an empty --out"
        )
    if champion is not None and len(known) < 2:
        raise ValueError(
            f"the checkpoint scores one pool, {known[0]}; refresh learns to route between two or more, so give another"
            " --base, or --cold"
        )
    return Standpoint(known, began, champion, cold)


def load(name: str, place: Path, pools: tuple[str, ...]) -> Known:
    """A checkpoint; of the shipped one, which is nobody's own, the pools are taken in order, as the gateway does."""
    place = checkpoint.resolve(place)
    estimator, tokenizer, manifest = model.load_model(place)
    calibration = calibration_of(checkpoint.load_checkpoint(place)[1][checkpoint.CALIBRATION])
    if place == checkpoint.BUILTIN.resolve() and len(pools) == len(manifest.pools):
        estimator = renamed(estimator, pools)
        calibration = dataclasses.replace(calibration, pools=pools)
    return Known(name, manifest, estimator, tokenizer, calibration)


def pools_of_traffic(labelled: Sequence[Labelled]) -> tuple[str, ...]:
    """The pools that records and labels name, cheapest first as the gateway ordered them."""
    longest = max((item.record.pools for item in labelled), key=len, default=())
    named = [label.pool for item in labelled for label in item.labels if label.quality is not None]
    return tuple(dict.fromkeys([*longest, *named]))


def predicted_by(known: Known, items: Sequence[Item]) -> Array:
    """Calibrated qualities (N, K) as they are served, of items made for this checkpoint."""
    learner = known.start.learner(learner_config(RefreshConfig()))
    return apply_calibration(known.calibration.stages["full"], learner.predict(items)[0])[0]


def honest(known: Known, traffic: Traffic) -> NDArray[np.bool_]:
    """Which examples (N,) a checkpoint was not fitted on: their labels are newer, and it remembers no such question."""
    trained_to = known.manifest.metrics.get("trained_to", -1)
    fair: NDArray[np.bool_] = (traffic.oldest_label > trained_to) & ~known_of(traffic.examples, known.manifest)
    return fair


def carried_targets(calibration: Calibration, champion: Known | None) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The champion's targets with thresholds found anew, and what could not be carried over."""
    targets: dict[str, dict[str, float]] = {}
    lost = []
    for target in champion.calibration.targets if champion else ():
        try:
            found = thresholds_of(calibration, [parse_target(target)], None)
        except ValueError as error:
            lost.append(f"the target {target} is not carried over: {error}")
            continue
        targets |= {name: dict(by_rule) for name, by_rule in found.items()}
    return targets, lost


def models_of(champion: Known | None, pools: tuple[str, ...]) -> dict[str, Any]:
    """Whose outcomes stand for each pool: the champion's, where it says, else each pool by its own name."""
    known = champion.manifest.metrics.get("models", {}) if champion else {}
    return {pool: known.get(pool, [pool]) for pool in pools}
