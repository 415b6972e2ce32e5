"""What a refresh learned, and how the gate sees it: calibrated held-out predictions, and the reference set.

Shapes: N examples, K pools cheapest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.calibration import Calibration, apply_calibration, measure_curve
from depo_gateway.estimator.learner import Item, Learner
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.evaluation.contamination import surely_new_to
from depo_gateway.training.evaluation.routing_metrics import Array
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.fitting.cross_fit import Held
from depo_gateway.training.online import joint_calibration
from depo_gateway.training.online.champion import Standpoint, predicted_by
from depo_gateway.training.online.cross_fit import CrossFit, cross_calibrated, learner_config
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.joint_calibration import Rotation
from depo_gateway.training.online.publish_gate import Judged
from depo_gateway.training.online.refresh_config import RefreshConfig
from depo_gateway.training.outcomes.table import Pools, Row, examples_of, key_of, labels
from depo_gateway.training.outcomes.traffic_examples import Traffic


@dataclass(frozen=True, slots=True)
class Learned:
    """The better start, and all that is known of the examples."""

    traffic: Traffic
    observed: Array  # (N, K) quality, NaN: no label
    weights: Array  # (N,)
    folds: NDArray[np.int64]  # (N,)
    items: list[Item]  # as the better start reads the examples
    best: CrossFit
    fair: NDArray[np.bool_]  # (N,) examples that the better start was not fitted on before


def calibrated_on(rows: NDArray[np.bool_], learned: Learned, at: Standpoint) -> tuple[Calibration, Rotation, Array]:
    """(the candidate's calibration, of the held-out predictions of `rows` (N,), once its weights hold the rotation; its
    qualities (N, K), those of `rows` by a calibration that left out their fold).
    """
    raw = learned.best.held
    turned = joint_calibration.fit(raw.full[rows], learned.observed[rows], learned.weights[rows])
    held = Held(turned.apply(raw.full), turned.apply(raw.cheap))
    known = next((known for known in (at.champion, at.base) if known and known.name == learned.best.start.name), None)
    _, tokens = labels(learned.traffic.examples, at.pools)
    full, cheap, observed, weights = held.full[rows], held.cheap[rows], learned.observed[rows], learned.weights[rows]
    before = None if known is None else known.calibration
    calibration = calibrate(full, cheap, observed, tokens[rows], weights, at.pools, before)
    quality, _ = apply_calibration(calibration.stages["full"], held.full)
    # where no prompt has every pool's label, what is missing is what is predicted: a quality target needs the curve
    likely = np.where(np.isnan(observed), quality[rows], observed)
    curves = {
        rule: measure_curve(quality[rows], likely, weights, rule) if measured.quality is None else measured
        for rule, measured in calibration.curves.items()
    }
    calibration = dataclasses.replace(calibration, curves=curves)
    quality[rows] = cross_calibrated(raw.full[rows], observed, weights, learned.folds[rows])
    return calibration, turned, quality


def judged(
    newest: NDArray[np.bool_],
    new: NDArray[np.bool_],
    calibrated_rows: NDArray[np.bool_],
    quality: Array,
    served: Array | None,
    learned: Learned,
) -> Judged:
    """The newest held-out prompts for the gate."""
    rows = np.flatnonzero(newest)
    inverse = learned.traffic.inverse[rows]
    return Judged(
        learned.traffic.pools,
        quality[rows],
        None if served is None else served[rows],
        learned.observed[rows],
        learned.weights[rows] / inverse,
        learned.traffic.served[rows],
        inverse,
        learned.folds[rows],
        new[rows],
        calibrated_rows[rows],
        learned.traffic.conversation[rows],
    )


def last(count: int, length: int) -> NDArray[np.bool_]:
    """The last `length` of `count` examples (N,)."""
    rows: NDArray[np.bool_] = np.arange(count) >= count - length
    return rows


def on_reference(
    rows: Sequence[Row],
    learner: Learner,
    calibration: Calibration,
    at: Standpoint,
    traffic: Traffic,
    config: RefreshConfig,
    cache: EmbeddingCache,
) -> Judged | None:
    """The reference set for the gate, without questions that the candidate was fitted on; None if too few remain."""
    if not rows:
        return None
    asked = {key_of(example.prompt) for example in traffic.examples}
    examples = examples_of(rows, Pools(at.pools, tuple((pool,) for pool in at.pools)))
    examples = [example for example in examples if key_of(example.prompt) not in asked]
    observed, _ = labels(examples, at.pools)
    if (~np.isnan(observed).any(1)).sum() < config.gate.least:
        return None
    quality, _ = apply_calibration(calibration.stages["full"], learner.predict(cache.items(learner, examples))[0])
    served = None
    if at.champion is not None:
        reader = at.champion.start.learner(learner_config(config))
        served = predicted_by(at.champion, cache.items(reader, examples))
    ones, nobody = np.ones(len(examples)), np.full(len(examples), -1)
    return Judged(at.pools, quality, served, observed, ones, nobody, ones, new=new_to_all(examples, at))


def new_to_all(examples: Sequence[Example], at: Standpoint) -> NDArray[np.bool_]:
    """Which examples (N,) no checkpoint was fitted on that the champion or the candidate may come from."""
    manifests = {known.manifest.version: known.manifest for known in (at.champion, at.base) if known is not None}
    new: NDArray[np.bool_] = np.all([surely_new_to(examples, manifest) for manifest in manifests.values()], 0)
    return new
