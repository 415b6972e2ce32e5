"""Fits an estimator by SGD epochs, cross-fitted: for a trunk, a trained encoder, or a loss that is not convex.

Shapes: N examples, K pools, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.model import Estimator
from depo_gateway.training.fitting.fit_config import FitConfig
from depo_gateway.training.fitting.held_out import HeldOutLogits, held_out_loss


def new_learner(model: Estimator, tokenizer: Tokenizer, config: LearnerConfig) -> Learner:
    """A learner on a copy of an untrained model. A frozen encoder is shared, one that is trained is copied."""
    shared = {} if config.train_layers else {id(model.encoder): model.encoder}
    return Learner(copy.deepcopy(model, shared), tokenizer, config)


def equal_batches(count: int, batch_size: int, order: np.random.Generator) -> list[NDArray[np.int64]]:
    """The numbers 0 to count - 1 in random order, in as few batches of at most `batch_size` as possible.

    Sizes differ by at most one: a step has the same learning rate whatever its size, so a last batch of one example
    would move the model as far as a whole batch does.
    """
    return np.array_split(order.permutation(count), max(1, -(-count // batch_size)))


def train_epoch(learner: Learner, items: Sequence[Item], batch_size: int, order: np.random.Generator) -> None:
    """One pass over the items in random order."""
    for rows in equal_batches(len(items), batch_size, order):
        learner.step_items([items[i] for i in rows])


def fit_epochs(
    start: Callable[[], Learner], items: Sequence[Item], foldings: Sequence[NDArray[np.int64]], config: FitConfig
) -> tuple[Learner, list[HeldOutLogits], int]:
    """(the learner of the first fold, held-out predictions by folding, epochs)."""
    threads = torch.get_num_threads()
    if not config.learner.train_layers:
        torch.set_num_threads(1)  # steps on precomputed embeddings are too small to parallelise
    try:
        predictions, epochs = cross_fit_epochs(start, items, foldings, config)
        learner, train, _, order = _fold_fit(start, items, foldings[0], 0, config.seed)
        for _ in tqdm(range(epochs), desc="fit what is served", unit="epoch", disable=None):
            train_epoch(learner, train, config.batch_size, order)
    finally:
        torch.set_num_threads(threads)
    learner.settle()
    return learner, predictions, epochs


def cross_fit_epochs(
    start: Callable[[], Learner], items: Sequence[Item], foldings: Sequence[NDArray[np.int64]], config: FitConfig
) -> tuple[list[HeldOutLogits], int]:
    """(held-out predictions by folding, epochs), at the epoch with the lowest mean of the foldings' held-out losses.

    One learner per fold of each folding; all are trained in step, epoch by epoch.
    """
    fits = [
        (folding, *_fold_fit(start, items, folds, fold, config.seed))
        for folding, folds in enumerate(foldings)
        for fold in range(int(folds.max()) + 1)
    ]
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


def _fold_fit(
    start: Callable[[], Learner], items: Sequence[Item], folds: NDArray[np.int64], fold: int, seed: int
) -> tuple[Learner, list[Item], NDArray[np.int64], np.random.Generator]:
    """What fits one fold's model: an untrained learner, its items, the rows it will predict, the order's generator."""
    train = [item for item, f in zip(items, folds, strict=True) if f != fold]
    learner = start()
    learner.fit_statistics(train)
    return learner, train, np.flatnonzero(folds == fold), np.random.default_rng([seed, fold])
