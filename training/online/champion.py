"""Where a refresh starts: the champion, which is served now and has to be beaten, and the base checkpoint. Torch.

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
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration, calibrate_quality
from depo_gateway.estimator.calibration import loads as calibration_of
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.model import Estimator
from depo_gateway.estimator.records.types import Labelled
from depo_gateway.training.evaluation.contamination import fitted_on
from depo_gateway.training.evaluation.targets import parse_target, thresholds_of
from depo_gateway.training.online.cross_fit import Initialisation, learner_config, rename_pools
from depo_gateway.training.online.refresh_config import RefreshConfig
from depo_gateway.training.outcomes.traffic_examples import Traffic


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint in memory, its pools named as the traffic's."""

    name: str  # champion | base
    manifest: Manifest
    estimator: Estimator
    tokenizer: Tokenizer
    calibration: Calibration

    @property
    def initialisation(self) -> Initialisation:
        return Initialisation(self.name, self.estimator, self.tokenizer, False, self.manifest)


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """The checkpoints that a refresh starts from."""

    pools: tuple[str, ...]  # that the candidate will score
    base: LoadedCheckpoint  # its encoder is the candidate's
    champion: LoadedCheckpoint | None  # None: nothing is served yet
    cold: bool  # only the base's encoder is used

    @property
    def parent(self) -> str:
        """The version that a candidate replaces, or else continues."""
        return (self.champion or self.base).manifest.version


def starting_point(base: Path, out: Path, cold: bool, labelled: Sequence[Labelled]) -> StartingPoint:
    """Loads the checkpoints: the champion is what `out/current` names or, unless cold, the base.

    Raises ValueError where the records name a pool that the champion does not score.
    """
    pools = pools_of_traffic(labelled)
    first = load_for_pools("base", base, pools)
    champion: LoadedCheckpoint | None = None if cold else first
    if (out / "current").is_file():
        champion = load_for_pools("champion", out, pools)
        first = champion if champion.manifest.version == first.manifest.version else first
    known = pools if champion is None else champion.estimator.config.pools
    if champion is not None and (other := [pool for pool in pools if pool not in known]):
        raise ValueError(
            f"the records name the pool {other[0]!r}, but the checkpoint scores {', '.join(known)}; give a --base for"
            " these pools, or --cold and an empty --out"
        )
    if champion is not None and len(known) < 2:
        raise ValueError(
            f"the checkpoint scores one pool, {known[0]}; refresh learns to route between two or more, so give another"
            " --base, or --cold"
        )
    return StartingPoint(known, first, champion, cold)


def load_for_pools(name: str, place: Path, pools: tuple[str, ...]) -> LoadedCheckpoint:
    """Loads a checkpoint. The pools of the shipped one take these names in order, as they do in the gateway."""
    place = checkpoint.resolve(place)
    estimator, tokenizer, manifest = model.load_model(place)
    calibration = calibration_of(checkpoint.load_checkpoint(place)[1][checkpoint.CALIBRATION])
    if place == checkpoint.BUILTIN.resolve() and len(pools) == len(manifest.pools):
        estimator = rename_pools(estimator, pools)
        calibration = dataclasses.replace(calibration, pools=pools)
    return LoadedCheckpoint(name, manifest, estimator, tokenizer, calibration)


def pools_of_traffic(labelled: Sequence[Labelled]) -> tuple[str, ...]:
    """The pools that records and labels name, cheapest first as the gateway ordered them."""
    longest = max((item.record.pools for item in labelled), key=len, default=())
    named = [label.pool for item in labelled for label in item.labels if label.quality is not None]
    return tuple(dict.fromkeys([*longest, *named]))


def served_quality(loaded: LoadedCheckpoint, items: Sequence[Item]) -> Array:
    """Calibrated qualities (N, K) as this checkpoint serves them, of items made for it."""
    learner = loaded.initialisation.learner(learner_config(RefreshConfig()))
    logits, distances = learner.predict(items)[0], learner.distances(items)
    if distances is not None:
        logits = loaded.calibration.trusted(logits, distances)
    return calibrate_quality(loaded.calibration.stages["full"], logits)


def new_to(loaded: LoadedCheckpoint, traffic: Traffic) -> NDArray[np.bool_]:
    """Which examples (N,) a checkpoint was not fitted on: their labels are newer, and it remembers no such question."""
    trained_to = loaded.manifest.metrics.get("trained_to", -1)
    new: NDArray[np.bool_] = (traffic.oldest_label > trained_to) & ~fitted_on(traffic.examples, loaded.manifest)
    return new


def carried_targets(
    calibration: Calibration, champion: LoadedCheckpoint | None
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """(the champion's targets with thresholds found anew; notes on those that could not be carried over)."""
    targets: dict[str, dict[str, float]] = {}
    notes = []
    for target in champion.calibration.targets if champion else ():
        try:
            thresholds = thresholds_of(calibration, [parse_target(target)], None)
        except ValueError as error:
            notes.append(f"the target {target} is not carried over: {error}")
            continue
        targets |= {name: dict(by_rule) for name, by_rule in thresholds.items()}
    return targets, notes


def models_of(champion: LoadedCheckpoint | None, pools: tuple[str, ...]) -> dict[str, Any]:
    """The models whose outcomes are used as each pool's: as in the champion's manifest, else the pool's own name."""
    known = champion.manifest.metrics.get("models", {}) if champion else {}
    return {pool: known.get(pool, [pool]) for pool in pools}
