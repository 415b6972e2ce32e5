"""Initialisations of a refresh, and their held-out predictions: the champion's weights, or fresh heads. Torch.

Shapes: N examples, K pools, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Stage, calibrate_quality, fit_platt
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.model import Estimator
from depo_gateway.training.fitting.epoch_fit import train_epoch
from depo_gateway.training.fitting.held_out import HeldOutLogits
from depo_gateway.training.online.joint_calibration import fit_logit_transform
from depo_gateway.training.online.refresh_config import RefreshConfig

COMPLETE_EXAMPLES = 100  # with labels of first and last pool, from which on initialisations are compared by the gain


@dataclass(frozen=True, slots=True)
class Initialisation:
    """The weights that a refresh starts from."""

    name: str  # champion | base | fresh
    model: Estimator  # never stepped itself: learners take copies of all but the encoder
    tokenizer: Tokenizer
    fresh: bool  # untrained heads: statistics are fitted anew
    parent: Manifest | None = None  # of the checkpoint with these weights; None: fresh
    empty_centres: int = 0  # the model's last ones, which the examples fill

    def learner(self, config: LearnerConfig) -> Learner:
        shared = {id(self.model.encoder): self.model.encoder}
        learner = Learner(copy.deepcopy(self.model, shared), self.tokenizer, config)
        # A refresh takes tens of steps. A loaded model's running average would move by 1% a step, so hardly at all;
        # begun anew, it soon forgets its first value, as a fresh model's does.
        learner.settled = False
        return learner

    def fitted_to(self, items: Sequence[Item], config: LearnerConfig) -> Learner:
        """A learner with the statistics and centres of the items, before its first step."""
        learner = self.learner(config)
        if self.fresh:
            learner.fit_statistics(items)
        elif self.empty_centres:
            states = torch.stack([item.embedding for item in items if item.embedding is not None])
            learner.model.similarity.fill(states[:, learner.model.width :], self.empty_centres)
        return learner


@dataclass(frozen=True, slots=True)
class CrossFit:
    """Held-out predictions of one initialisation."""

    initialisation: Initialisation
    logits: HeldOutLogits  # (N, K, H) of both stages, each example's by a model that was not fitted on it
    epochs: int
    loss: float  # held-out


def fresh_heads(
    model: Estimator, pools: tuple[str, ...], seed: int, groups: tuple[str, ...] = (), centres: int = 0
) -> Estimator:
    """An untrained estimator on the same encoder, possibly of other pools. One with a trunk has no centres."""
    config = replace(model.config, pools=pools, groups=groups, centres=0 if model.config.trunk else centres)
    heads = Estimator(config, model.encoder, model.vocabulary, model.width, model.rounded, seed)
    heads.trained = model.trained
    return heads.to(model.device)


def rename_pools(model: Estimator, pools: tuple[str, ...]) -> Estimator:
    """The same estimator with other names for its pools, in the same order."""
    if pools == model.config.pools:
        return model
    renamed = fresh_heads(model, pools, 0, model.config.groups, model.config.centres)
    renamed.load_state_dict(model.state_dict())
    renamed.loaded = model.loaded
    return renamed


def learner_config(config: RefreshConfig) -> LearnerConfig:
    return LearnerConfig(
        learning_rate=config.learning_rate,
        wide_learning_rate=config.wide_learning_rate,
        gain_weight=config.gain_weight,
        distillation_weight=config.distillation_weight,
        weight_decay=config.weight_decay,
    )


def cross_fit_initialisation(
    initialisation: Initialisation,
    items: Sequence[Item],
    folds: NDArray[np.int64],
    new: NDArray[np.bool_],
    config: RefreshConfig,
) -> CrossFit:
    """Fits a learner for each fold, and predicts the fold that it was not fitted on.

    Trained weights may be best unchanged: then the result has 0 epochs.

    Args:
        new: examples (N,) that no initialisation was fitted on before; only they count in the loss.
    """
    stops = [config.epochs] if initialisation.fresh else [0, config.epochs]
    logits = [HeldOutLogits(*np.zeros((2, len(items), *initialisation.model.config.shape))) for _ in stops]
    count = int(folds.max()) + 1
    with tqdm(total=count * config.epochs, desc=f"from {initialisation.name}", unit="epoch", disable=None) as progress:
        for fold in range(count):
            train = [item for item, f in zip(items, folds, strict=True) if f != fold]
            rows = np.flatnonzero(folds == fold)
            holdout = [items[i] for i in rows.tolist()]
            learner = initialisation.fitted_to(train, learner_config(config))
            order = np.random.default_rng([config.seed, fold])
            epochs = 0
            for stop, predicted in zip(stops, logits, strict=True):
                for _ in range(stop - epochs):
                    train_epoch(learner, train, config.batch_size, order)
                    progress.update()
                epochs = stop
                predicted.full[rows], predicted.cheap[rows] = learner.predict(holdout)
    losses = [calibrated_loss(predicted.full, items, new) for predicted in logits]
    best = int(np.argmin(losses))
    return CrossFit(initialisation, logits[best], stops[best], losses[best])


def fit_on_everything(fitted: CrossFit, items: Sequence[Item], config: RefreshConfig) -> Learner:
    """A model fitted on all examples, for as many epochs as the cross-fit took."""
    learner = fitted.initialisation.fitted_to(items, learner_config(config))
    order = np.random.default_rng([config.seed, config.folds])
    for _ in range(fitted.epochs):
        train_epoch(learner, items, config.batch_size, order)
    learner.settle()
    return learner


def calibrated_loss(logits_NKH: Array, items: Sequence[Item], new: NDArray[np.bool_]) -> float:
    """The loss by which initialisations are compared, on held-out logits.

    It is the squared error of the gain where enough prompts have all labels, else of the qualities. It is taken after
    calibration, because calibration corrects the scale of the logits anyway.
    """
    observed = np.array([item.quality for item in items], float)[new]
    weights = np.array([item.weight for item in items], float)[new]
    quality = calibrated_quality(logits_NKH[new], observed, weights)
    gain = observed[:, -1] - observed[:, 0]
    if (~np.isnan(gain)).sum() >= COMPLETE_EXAMPLES:
        error = ((quality[:, -1] - quality[:, 0] - gain) ** 2)[:, None]
    else:
        error = (quality - observed) ** 2
    seen = ~np.isnan(error)
    total: Array = weights[:, None] * seen
    return float((total * np.where(seen, error, 0.0)).sum() / total.sum())


def calibrated_quality(logits_NKH: Array, observed: Array, weights: Array) -> Array:
    """Qualities (N, K) by a joint calibration that is fitted on the same rows."""
    transformed = fit_logit_transform(logits_NKH, observed, weights).apply(logits_NKH)
    return calibrate_quality(platt_stage(transformed, observed, weights), transformed)


def cross_calibrated_quality(logits_NKH: Array, observed: Array, weights: Array, folds: NDArray[np.int64]) -> Array:
    """Qualities (N, K), each fold's by a joint calibration that is fitted on the other folds."""
    quality = np.empty(observed.shape)
    for fold in np.unique(folds):
        rows = folds == fold
        transform = fit_logit_transform(logits_NKH[~rows], observed[~rows], weights[~rows])
        stage = platt_stage(transform.apply(logits_NKH[~rows]), observed[~rows], weights[~rows])
        quality[rows] = calibrate_quality(stage, transform.apply(logits_NKH[rows]))
    return quality


def platt_stage(logits_NKH: Array, observed: Array, weights: Array) -> Stage:
    """A calibration of the qualities alone."""
    columns = zip(logits_NKH[:, :, QUALITY].T, observed.T, strict=True)
    return {"quality": tuple(fit_platt(logits, labels, weights) for logits, labels in columns)}
