"""Cross-fitting: every question is predicted by a model that was not fitted on it; a final model is fitted on all.

The held-out predictions decide when to stop, measure the estimator and calibrate it.

Shapes: N examples, K pools, H heads, E epochs, F folds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.logistic import sigmoid
from depo_gateway.estimator.model import Estimator
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.outcomes.table import folds_of, question_key


@dataclass(frozen=True, slots=True)
class FitConfig:
    """Settings of a fit to outcome tables."""

    learner: LearnerConfig = field(default_factory=LearnerConfig)
    folds: int = 5
    max_epochs: int = 200  # a narrow domain takes 150, exam questions 5 to 15
    patience: int = 5  # epochs without a lower held-out loss before all folds stop
    batch_size: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class HeldOutLogits:
    """Held-out logits of every example, (N, K, H) each, at the chosen epoch."""

    full: Array
    cheap: Array


def new_learner(model: Estimator, tokenizer: Tokenizer, config: LearnerConfig) -> Learner:
    """A learner on a copy of an untrained model. A frozen encoder is shared, one that is trained is copied."""
    shared = {} if config.train_layers else {id(model.encoder): model.encoder}
    return Learner(copy.deepcopy(model, shared), tokenizer, config)


def train_epoch(learner: Learner, items: Sequence[Item], batch_size: int, order: np.random.Generator) -> None:
    """One pass over the items in random order."""
    rows = order.permutation(len(items))
    for start in range(0, len(rows), batch_size):
        learner.step_items([items[i] for i in rows[start : start + batch_size]])


def foldings_of(examples: Sequence[Example], config: FitConfig) -> list[NDArray[np.int64]]:
    """Assignments of examples to folds (N,): by question and, if the table has groups, by group.

    The first measures predictions for questions like the known ones, the second for questions of a new kind. If there
    are fewer groups than folds, each group is a fold.
    """
    foldings = [folds_of([question_key(example.prompt) for example in examples], config.folds, config.seed)]
    if any(example.group for example in examples):
        groups = groups_of(examples)
        foldings.append(folds_of(groups, min(config.folds, len(set(groups))), config.seed))
    return foldings


def groups_of(examples: Sequence[Example]) -> list[str]:
    """The unit in which each example is held out: its group, or its question if it has no group."""
    return [example.group or question_key(example.prompt) for example in examples]


def cross_fit(
    start: Callable[[], Learner], items: Sequence[Item], foldings: Sequence[NDArray[np.int64]], config: FitConfig
) -> tuple[list[HeldOutLogits], int]:
    """(held-out predictions by folding, epochs), at the epoch with the lowest mean of the foldings' held-out losses.

    One learner per fold of each folding; all are trained in step, epoch by epoch.
    """
    fits = []
    for folding, folds in enumerate(foldings):
        for fold in range(int(folds.max()) + 1):
            train = [item for item, f in zip(items, folds, strict=True) if f != fold]
            learner = start()
            learner.fit_statistics(train)
            order = np.random.default_rng([config.seed, fold])
            fits.append((folding, learner, train, np.flatnonzero(folds == fold), order))
    best: tuple[list[HeldOutLogits], int] = ([], 0)
    best_loss = np.inf
    shape = fits[0][1].model.config.shape
    with tqdm(total=config.max_epochs, desc="fit", unit="epoch", disable=None) as progress:
        for number in range(1, config.max_epochs + 1):
            predictions = [HeldOutLogits(*np.zeros((2, len(items), *shape))) for _ in foldings]
            for folding, learner, train, rows, order in fits:
                train_epoch(learner, train, config.batch_size, order)
                held_out = predictions[folding]
                held_out.full[rows], held_out.cheap[rows] = learner.predict([items[i] for i in rows.tolist()])
            loss = sum(held_out_loss(one.full, items) for one in predictions) / len(predictions)
            progress.update()
            progress.set_postfix(held_out=f"{loss:.4f}")
            if loss < best_loss:
                best, best_loss = (predictions, number), loss
            elif number - best[1] >= config.patience:
                break
    return best


def held_out_loss(logits: Array, items: Sequence[Item]) -> float:
    """The criterion of early stopping: squared error of quality differences, or of a single pool's quality."""
    observed = np.array([item.quality for item in items])
    weights = np.array([item.weight for item in items])
    predicted = sigmoid(logits[:, :, QUALITY])
    if observed.shape[1] > 1 and not np.isnan(np.diff(observed, axis=1)).all():
        predicted, observed = np.diff(predicted, axis=1), np.diff(observed, axis=1)
    error = (predicted - observed) ** 2
    return float(np.nansum(error * weights[:, None]) / (weights[:, None] * ~np.isnan(error)).sum())


def fit_estimator(
    model: Estimator, tokenizer: Tokenizer, examples: Sequence[Example], config: FitConfig
) -> tuple[Learner, list[HeldOutLogits], int]:
    """Cross-fits to choose the number of epochs, then fits on all: (the learner, held-out predictions, epochs)."""
    learner = new_learner(model, tokenizer, config.learner)
    items: list[Item] = []
    with tqdm(total=len(examples), desc="read prompts", unit="prompt", disable=None) as progress:
        for start in range(0, len(examples), 512):
            items += learner.items(examples[start : start + 512])
            progress.update(len(items) - progress.n)
    threads = torch.get_num_threads()
    if not config.learner.train_layers:
        torch.set_num_threads(1)  # steps on precomputed embeddings are too small to parallelise
    try:
        predictions, epochs = cross_fit(
            lambda: new_learner(model, tokenizer, config.learner), items, foldings_of(examples, config), config
        )
        learner.fit_statistics(items)
        order = np.random.default_rng([config.seed, config.folds])
        for _ in tqdm(range(epochs), desc="fit on everything", unit="epoch", disable=None):
            train_epoch(learner, items, config.batch_size, order)
    finally:
        torch.set_num_threads(threads)
    return learner, predictions, epochs
