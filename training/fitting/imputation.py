"""Imputes the pools' labels on questions that only other models have answered.

Each pool's loadings on the questions' factors are fitted to its own labels; they predict its labels on the prior's
other questions. Where the prior has an own question, its factors come from other models' outcomes, else from its text.

A model of a fold knows nothing of the fold's questions and groups: its factors, loadings and imputed labels are made
without the prior's outcomes on them, because at serving nothing is known of a fresh prompt.

Shapes: N own examples, Q questions of the prior, P of them that are not own ones, M models (of folds, then of
everything), K pools, F factors, X text features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.logistic import fit_logistic, sigmoid
from depo_gateway.estimator.model import Estimator
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.fitting.item_response import question_factors
from depo_gateway.training.fitting.linear_fit import Columns
from depo_gateway.training.fitting.prior_outcomes import PriorOutcomes
from depo_gateway.training.outcomes.table import question_key

# Prior of the loadings: a pool's logit rises by 1 with the easiness, as other models' do, and not with the components
INTERCEPT_RIDGE, EASINESS_RIDGE, COMPONENT_RIDGE = 0.1, 5.0, 5.0
MOST_WEIGHT = 3.0  # of all imputed labels together, in own labels' weight
TEXT_RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # one is chosen for each factor


@dataclass(frozen=True, slots=True)
class Imputed:
    """Labels of the prior's questions as each model of a cross-fit may know them."""

    items: Sequence[Item]  # P
    labels: Array  # (P, M, K) qualities
    weights: Array  # (P, M); 0: held out from this model


def impute(
    model: Estimator,
    items: Sequence[Item],
    examples: Sequence[Example],
    prior_items: Sequence[Item],
    prior: PriorOutcomes,
    foldings: Sequence[NDArray[np.int64]],
) -> Imputed:
    """Imputed labels for every fold of every folding, then for everything. The model needs its statistics."""
    own_keys = [_key(example) for example in examples]
    place = {_key(example): number for number, example in enumerate(prior.examples)}
    known_N = np.array([place.get(key, -1) for key in own_keys])
    further = np.setdiff1d(np.arange(len(prior.examples)), known_N)
    text_own, text_prior = (text_features(model, of) for of in (items, prior_items))
    labels_NK = np.array([item.quality for item in items])
    weights_N = np.array([item.weight for item in items])
    fits = [(folds != fold) for folds in foldings for fold in range(int(folds.max()) + 1)]
    fits.append(np.ones(len(items), np.bool_))
    labels = np.zeros((len(further), len(fits), labels_NK.shape[1]))
    weights = np.zeros((len(further), len(fits)))
    for number, train_N in enumerate(fits):
        allowed = np.flatnonzero(_allowed(prior.examples, [e for e, t in zip(examples, train_N, strict=True) if not t]))
        if not len(allowed):
            continue  # every question of the prior is in this fold's groups
        found = question_factors(prior.outcomes[allowed])
        factors = np.full((len(prior.examples), found.shape[1]), np.nan)
        factors[allowed] = found
        train = np.flatnonzero(train_N)
        design = _own_factors(factors, known_N[train], text_own[train], text_prior, allowed)
        used = np.intersect1d(further, allowed)
        rows = np.searchsorted(further, used)
        for k in range(labels_NK.shape[1]):
            labels[rows, number, k] = _imputed(design, labels_NK[train, k], weights_N[train], factors[used])
        weights[rows, number] = min(1.0, MOST_WEIGHT * weights_N[train].sum() / max(len(used), 1))
    return Imputed([prior_items[i] for i in further.tolist()], labels, weights)


def text_features(model: Estimator, items: Sequence[Item]) -> Array:
    """Standardised embedding and surface features (N, X)."""
    embedding = np.stack([_embedding(item)[: model.width] for item in items]).astype(float)
    scaled: Array = (embedding - model.embedding_mean.numpy()) * model.embedding_scale.numpy()
    if not model.config.wide:
        return scaled
    surface = np.array([item.prepared.surface for item in items])
    standard = (surface - model.surface_mean.numpy()) * model.surface_scale.numpy()
    return np.hstack([scaled, np.clip(standard, -4.0, 4.0) / surface.shape[1] ** 0.5])


def predict_factors(text_QX: Array, factors_QF: Array, text_NX: Array) -> Array:
    """Factors (N, F) of other texts by ridge regression, with the ridge of the lowest generalised cross-validation."""
    mean_X, mean_F = text_QX.mean(0), factors_QF.mean(0)
    centred, targets = text_QX - mean_X, factors_QF - mean_F
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values = np.maximum(values, 0.0)
    rotated_QX, projected_XF = centred @ vectors, vectors.T @ (centred.T @ targets)
    best = np.full(targets.shape[1], np.inf)
    predicted = np.zeros((len(text_NX), targets.shape[1]))
    for ridge in TEXT_RIDGES:
        shrunk_XF = projected_XF / (values + ridge)[:, None]
        freedom = float((values / (values + ridge)).sum())
        error_F = ((targets - rotated_QX @ shrunk_XF) ** 2).mean(0) / max(1 - freedom / len(targets), 1e-3) ** 2
        better = error_F < best
        best = np.where(better, error_F, best)
        predicted = np.where(better, mean_F + (text_NX - mean_X) @ (vectors @ shrunk_XF), predicted)
    return predicted


def with_imputed(columns: Columns, imputed: Imputed, labelled: NDArray[np.int64], heads: int) -> Columns:
    """The columns of a linear fit with the imputed examples below its own. Only the quality head has imputed labels.

    `labelled` (L,): the numbers of the outputs that a model of the columns has.
    """
    labels_PML = np.where(labelled % heads == QUALITY, imputed.labels[:, :, labelled // heads], np.nan)
    seen = ~np.isnan(labels_PML)
    targets, counts = np.where(seen, labels_PML, 0.0), seen * imputed.weights[:, :, None]
    below = [torch.from_numpy(part.reshape(len(part), -1)) for part in (targets, counts)]
    return Columns(torch.cat([columns.targets, below[0]]), torch.cat([columns.counts, below[1]]), columns.bias)


def _allowed(prior: Sequence[Example], held_out: Sequence[Example]) -> NDArray[np.bool_]:
    """The prior's questions (Q,) that are neither among the held-out ones nor, where those have groups, in them."""
    questions = {question_key(example.prompt) for example in held_out}
    groups = {example.group for example in held_out if example.group}
    return np.array([question_key(e.prompt) not in questions and e.group not in groups for e in prior])


def _own_factors(
    factors_QF: Array, known: NDArray[np.int64], text: Array, prior_text: Array, allowed: NDArray[np.int64]
) -> Array:
    """The factors of own examples: of the allowed question of the prior that each is (-1: none), else from text."""
    measured = (known >= 0) & np.isin(known, allowed)
    found = factors_QF[known]
    if not measured.all():
        found[~measured] = predict_factors(prior_text[allowed], factors_QF[allowed], text[~measured])
    return found


def _imputed(factors_NF: Array, labels_N: Array, weights_N: Array, wanted_PF: Array) -> Array:
    """Labels of the wanted questions by one pool's loadings, which are fitted to its own labels."""
    labelled = ~np.isnan(labels_N)
    labels, weights, factors = labels_N[labelled], weights_N[labelled], factors_NF[labelled]
    if not len(labels):
        return np.full(len(wanted_PF), np.nan)
    centre = factors.mean(0)
    mean = (float(weights @ labels) + 0.5) / (float(weights.sum()) + 1.0)
    count = factors.shape[1] - 1
    prior = np.array([np.log(mean / (1 - mean)), 1.0, *[0.0] * count])
    ridge = np.array([INTERCEPT_RIDGE, EASINESS_RIDGE, *[COMPONENT_RIDGE] * count])
    design = np.column_stack([np.ones(len(labels)), factors - centre])
    loadings = fit_logistic(design, labels, weights, prior, ridge)
    return sigmoid(np.column_stack([np.ones(len(wanted_PF)), wanted_PF - centre]) @ loadings)


def _key(example: Example) -> tuple[str, str]:
    return question_key(example.prompt), example.context


def _embedding(item: Item) -> Array:
    assert item.embedding is not None, "imputation needs a frozen encoder"
    return item.embedding.numpy()
