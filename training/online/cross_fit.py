"""Where a refresh may start from, the champion's weights or fresh heads on its encoder, and how far each gets. Torch.

Shapes: N examples, K pools.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from depo_gateway.estimator.calibration import Stage, apply_calibration, fit_platt
from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.model import Estimator
from depo_gateway.training.evaluation.routing_metrics import Array
from depo_gateway.training.fitting.cross_fit import Held, epoch
from depo_gateway.training.online import joint_calibration
from depo_gateway.training.online.refresh_config import RefreshConfig

COMPLETE = 100  # examples with labels of first and last pool, from which on starts are compared by the gain


@dataclass(frozen=True, slots=True)
class Start:
    name: str  # champion | base | fresh
    model: Estimator  # never stepped itself: learners take copies of all but the encoder
    tokenizer: Tokenizer
    fresh: bool  # untrained heads: statistics are fitted anew

    def learner(self, config: LearnerConfig) -> Learner:
        shared = {id(self.model.encoder): self.model.encoder}
        learner = Learner(copy.deepcopy(self.model, shared), self.tokenizer, config)
        # A refresh takes tens of steps. A loaded model's average would follow by 1% a step and hardly move; begun anew
        # it soon forgets where it came from, as a fresh model's does.
        learner.settled = False
        return learner


@dataclass(frozen=True, slots=True)
class CrossFit:
    start: Start
    held: Held  # logits (N, K, 2) of both stages, of examples the models were not fitted on
    epochs: int
    loss: float


def fresh_heads(model: Estimator, pools: tuple[str, ...], seed: int) -> Estimator:
    """An untrained estimator of other pools, perhaps, on the same encoder."""
    config = replace(model.config, pools=pools)
    made = Estimator(config, model.encoder, model.vocabulary, model.width, model.rounded, seed)
    made.trained = model.trained
    return made.to(model.device)


def renamed(model: Estimator, pools: tuple[str, ...]) -> Estimator:
    """The same estimator with its pools called otherwise, in the same order."""
    if pools == model.config.pools:
        return model
    made = fresh_heads(model, pools, 0)
    made.load_state_dict(model.state_dict())
    made.loaded = model.loaded
    return made


def learner_config(config: RefreshConfig) -> LearnerConfig:
    return LearnerConfig(
        learning_rate=config.learning_rate,
        wide_learning_rate=config.wide_learning_rate,
        gain_weight=config.gain_weight,
        distillation_weight=config.distillation_weight,
        weight_decay=config.weight_decay,
    )


def cross_fit(
    start: Start, items: Sequence[Item], folds: NDArray[np.int64], fair: NDArray[np.bool_], config: RefreshConfig
) -> CrossFit:
    """Fit a learner a fold, and predict the fold it was not fitted on.

    A start that has learned already may be best as it is: then it takes 0 epochs.

    Args:
        fair: examples (N,) that no start was fitted on before; the loss is theirs.
    """
    stops = [config.epochs] if start.fresh else [0, config.epochs]
    helds = [Held(*np.zeros((2, len(items), len(items[0].quality), 2))) for _ in stops]
    count = int(folds.max()) + 1
    with tqdm(total=count * config.epochs, desc=f"from {start.name}", unit="epoch", disable=None) as progress:
        for fold in range(count):
            train = [item for item, f in zip(items, folds, strict=True) if f != fold]
            rows = np.flatnonzero(folds == fold)
            aside = [items[i] for i in rows.tolist()]
            learner = start.learner(learner_config(config))
            if start.fresh:
                learner.fit_statistics(train)
            order = np.random.default_rng([config.seed, fold])
            done = 0
            for stop, held in zip(stops, helds, strict=True):
                for _ in range(stop - done):
                    epoch(learner, train, config.batch_size, order)
                    progress.update()
                done = stop
                held.full[rows], held.cheap[rows] = learner.predict(aside)
    losses = [held_out_loss(held.full, items, fair) for held in helds]
    best = int(np.argmin(losses))
    return CrossFit(start, helds[best], stops[best], losses[best])


def finish(fitted: CrossFit, items: Sequence[Item], config: RefreshConfig) -> Learner:
    """The model of a cross-fit's epochs on everything."""
    learner = fitted.start.learner(learner_config(config))
    if fitted.start.fresh:
        learner.fit_statistics(items)
    order = np.random.default_rng([config.seed, config.folds])
    for _ in range(fitted.epochs):
        epoch(learner, items, config.batch_size, order)
    learner.settle()
    return learner


def held_out_loss(logits_NKH: Array, items: Sequence[Item], fair: NDArray[np.bool_]) -> float:
    """What starts are compared by: squared error of the gain where enough prompts have all labels, else of
    the qualities. After calibration, so that a start is not judged by a scale that calibration sets right anyway.
    """
    observed = np.array([item.quality for item in items], float)[fair]
    weights = np.array([item.weight for item in items], float)[fair]
    quality = calibrated(logits_NKH[fair], observed, weights)
    gain = observed[:, -1] - observed[:, 0]
    if (~np.isnan(gain)).sum() >= COMPLETE:
        error = ((quality[:, -1] - quality[:, 0] - gain) ** 2)[:, None]
    else:
        error = (quality - observed) ** 2
    seen = ~np.isnan(error)
    total: Array = weights[:, None] * seen
    return float((total * np.where(seen, error, 0.0)).sum() / total.sum())


def calibrated(logits_NKH: Array, observed: Array, weights: Array) -> Array:
    """Qualities (N, K) by a joint calibration, fitted on the same rows."""
    turned = joint_calibration.fit(logits_NKH, observed, weights).apply(logits_NKH)
    return apply_calibration(platts(turned, observed, weights), turned)[0]


def cross_calibrated(logits_NKH: Array, observed: Array, weights: Array, folds: NDArray[np.int64]) -> Array:
    """Qualities (N, K), each fold's by a joint calibration fitted on the other folds."""
    quality = np.empty(observed.shape)
    for fold in np.unique(folds):
        rows = folds == fold
        found = joint_calibration.fit(logits_NKH[~rows], observed[~rows], weights[~rows])
        stage = platts(found.apply(logits_NKH[~rows]), observed[~rows], weights[~rows])
        quality[rows] = apply_calibration(stage, found.apply(logits_NKH[rows]))[0]
    return quality


def platts(logits_NKH: Array, observed: Array, weights: Array) -> Stage:
    quality = tuple(fit_platt(logits_NKH[:, k, 0], observed[:, k], weights) for k in range(observed.shape[1]))
    return Stage(quality, quality)
