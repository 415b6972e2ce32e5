"""Fits linear heads on a frozen encoder: logistic regression with a ridge penalty, solved to convergence.

One model for each fold and one on everything are the columns of one problem, so they share the design matrix. Each
column is solved by Newton's method; a step's linear system by conjugate gradients, which need only products with the
design. The fit has no learning rate, order or epochs: a fold's model differs from the model on everything only by the
examples left out. Many small folds therefore measure the model that is served.

Shapes: N examples, V n-grams that occur in them, S surface features, D embedding width, G groups, O outputs of a model,
C columns: (folds + 1) * O.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from depo_gateway.estimator import wide
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.model import Estimator
from depo_gateway.estimator.similarity import CHUNK

DEEP_VARIANCE = 0.375  # prior variance of the embedding's weights, where the wide part's is 1; from 0.1 to 1 is alike
SIMILARITY_VARIANCE = 1.5  # of the weights of similarities
GROUP_VARIANCE = 0.3  # of a group's weight
BIAS_PENALTY = 0.1  # keeps a bias finite where all labels are equal
NEWTON_STEPS, GRADIENT_STEPS = 30, 60
TOLERANCE = 1e-4  # of the gradient, relative to its size at zero weights
FORCING = 0.1  # a Newton system is solved until its residual is this fraction of the gradient
HALVINGS = 6
SMALLEST_CURVATURE = 1e-6
MOST_COMPRESSED = 2500  # examples, whose Gram matrix is decomposed in seconds
SMALLEST_EIGENVALUE = 1e-10  # relative to the largest; smaller ones are rounding errors


@dataclass(slots=True)
class Weights:
    """Coefficients of C columns. Of a step, a gradient or the products of conjugate gradients alike."""

    wide: Tensor  # (V, C) or (R, C), see Design
    surface: Tensor  # (S, C)
    deep: Tensor  # (D, C) or (D + centres, C), of features that are scaled by their prior's deviation
    group: Tensor  # (G, C), divided by sqrt(GROUP_VARIANCE)
    bias: Tensor  # (1, C)

    def parts(self) -> tuple[Tensor, ...]:
        return self.wide, self.surface, self.deep, self.group, self.bias

    def plus(self, other: Weights, scale_C: Tensor) -> Weights:
        """self + scale * other, column by column."""
        return Weights(*(a + scale_C * b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def dot(self, other: Weights) -> Tensor:
        """Inner products (C,), column by column."""
        total: Tensor = sum((a * b).sum(0) for a, b in zip(self.parts(), other.parts(), strict=True))  # type: ignore[assignment]
        return total

    def select(self, columns: NDArray[np.int64]) -> Weights:
        index = torch.from_numpy(columns)
        return Weights(*(part[:, index] for part in self.parts()))


class Design:
    """The features of N examples as the estimator reads them; products with them and with their transpose.

    With few examples the n-grams are replaced by R <= N orthogonal directions, the eigenvectors of their Gram matrix: a
    ridge penalty is the same in every rotation, and the coefficients are shorter by a factor of V / R.
    """

    def __init__(self, model: Estimator, items: Sequence[Item]) -> None:
        """Reads rarity weights and scales from the model: call Learner.fit_statistics before."""
        self.has_wide = model.config.wide
        self.groups = len(model.config.groups)
        group = torch.tensor([item.group for item in items])
        self._in_group = torch.nonzero(group >= 0)[:, 0]  # rows of examples whose group is known
        self._group = group[self._in_group]
        # Without groups one model is fitted; with them the same weights serve prompts with and without one
        full, cheap = (0.5, 0.5) if self.groups else (1.0, 1.0)
        cheap *= self.has_wide
        self.stage_weights = (full, cheap, full, cheap) if self.groups else (full, cheap)
        self.features = np.zeros(0, np.int64)  # (V,) indices into the wide part's weights
        self.surface = torch.zeros(len(items), 0, dtype=torch.float64)
        self._wide = torch.zeros(len(items), 0, dtype=torch.float64)  # (N, V) or (N, R)
        self._wide_transposed = self._wide.T
        self._rotation: Tensor | None = None  # (V, R)
        if self.has_wide:
            ngrams, self.features = _ngram_matrix(model, items)
            self._set_ngrams(ngrams)
            read = torch.tensor([item.prepared.surface for item in items], dtype=torch.float64)
            scaled = (read - model.surface_mean.double()) * model.surface_scale.double()
            self.surface = wide.SURFACE_SCALE * scaled.clamp(-wide.CLIP, wide.CLIP)
        self.deep = _deep_features(model, items)

    def _set_ngrams(self, ngrams: Tensor) -> None:
        transposed = _sparse_rows(ngrams.t())
        self._wide, self._wide_transposed = ngrams, transposed
        if len(ngrams) > MOST_COMPRESSED:
            return
        values, vectors = torch.linalg.eigh((ngrams @ transposed).to_dense())
        kept = values > SMALLEST_EIGENVALUE * values[-1]
        roots, vectors = values[kept].sqrt(), vectors[:, kept]
        self._rotation = transposed @ (vectors / roots)
        self._wide = vectors * roots
        self._wide_transposed = self._wide.T.contiguous()

    def zeros(self, columns: int) -> Weights:
        sizes = (self._wide.shape[1], self.surface.shape[1], self.deep.shape[1], self.groups, 1)
        return Weights(*(torch.zeros(size, columns, dtype=torch.float64) for size in sizes))

    def logits(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """(full, cheap), (N, C) each, with the groups told. The cheap stage lacks the deep part."""
        full, cheap = self.stages(weights)[-2:]
        return full, cheap

    def stages(self, weights: Weights) -> tuple[Tensor, ...]:
        """(full, cheap), (N, C) each, and with groups the same two with the groups told."""
        cheap = self._wide @ weights.wide + self.surface @ weights.surface + weights.bias
        full = cheap + self.deep @ weights.deep
        if not self.groups:
            return full, cheap
        own = weights.group[self._group] * GROUP_VARIANCE**0.5
        return full, cheap, full.index_add(0, self._in_group, own), cheap.index_add(0, self._in_group, own)

    def transposed(self, stages: Sequence[Tensor]) -> Weights:
        """The transpose of `stages`: (N, C) of each -> coefficients."""
        full, cheap = stages[:2]
        group = torch.zeros(self.groups, full.shape[1], dtype=full.dtype)
        if self.groups:
            told = (stages[2] + stages[3])[self._in_group] * GROUP_VARIANCE**0.5
            group.index_add_(0, self._group, told)
            full, cheap = full + stages[2], cheap + stages[3]
        both = full + cheap
        return Weights(
            self._wide_transposed @ both, self.surface.T @ both, self.deep.T @ full, group, both.sum(0, keepdim=True)
        )

    def ngram_weights(self, weights: Weights) -> Tensor:
        """The coefficients of the n-grams `features`, (V, C)."""
        return weights.wide if self._rotation is None else self._rotation @ weights.wide


def _ngram_matrix(model: Estimator, items: Sequence[Item]) -> tuple[Tensor, NDArray[np.int64]]:
    """tf-idf values of unit length (N, V), sparse by rows, and the V n-grams' numbers."""
    idf = model.idf.double().numpy()
    rows = [item.counts * idf[item.indices] for item in items]
    values = np.concatenate([row / max(float(np.sqrt(row @ row)), 1e-9) for row in rows])
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    features, places = np.unique(np.concatenate([item.indices for item in items]), return_inverse=True)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "CSR support is in beta state"
        matrix = torch.sparse_csr_tensor(
            torch.from_numpy(offsets),
            torch.from_numpy(places),
            torch.from_numpy(values),
            (len(items), len(features)),
            check_invariants=False,
        )
    return matrix, features


def _deep_features(model: Estimator, items: Sequence[Item]) -> Tensor:
    """Standardised embedding and similarities (N, D or D + centres), each scaled by its prior's deviation."""
    embedding = torch.stack([_embedding(item) for item in items])
    scaled: Tensor = model.standardised(embedding).double() * DEEP_VARIANCE**0.5
    if not model.config.centres:
        return scaled
    with torch.no_grad():
        cosines = [model.cosines(part) for part in torch.split(embedding, CHUNK)]
        features = torch.cat([model.similarity.features(part) for part in cosines if part is not None])
    return torch.cat([scaled, features.double() * SIMILARITY_VARIANCE**0.5], 1)


def _sparse_rows(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return matrix.to_sparse_csr()


def _embedding(item: Item) -> Tensor:
    assert item.embedding is not None, "a linear fit needs a frozen encoder"
    return item.embedding


@dataclass(frozen=True, slots=True)
class Columns:
    """What each column fits: its targets and which examples count."""

    targets: Tensor  # (N, C), 0 where there is no label
    counts: Tensor  # (N, C): the example's weight; 0: held out, or no label
    bias: Tensor  # (1, C): logit of the mean label, to which the bias is drawn


def columns_of(labels_NO: Tensor, weights_N: Tensor, foldings: Sequence[NDArray[np.int64]]) -> Columns:
    """The columns of every fold of every folding, then of everything; O columns each. NaN: no label."""
    seen = ~labels_NO.isnan()
    targets, counts = torch.where(seen, labels_NO, 0.0), seen * weights_N[:, None]
    masks = [torch.from_numpy(folds != fold) for folds in foldings for fold in range(int(folds.max()) + 1)]
    masks.append(torch.ones(len(labels_NO), dtype=torch.bool))
    all_counts = torch.cat([counts * mask[:, None] for mask in masks], 1)
    all_targets = targets.repeat(1, len(masks))
    mean = ((all_counts * all_targets).sum(0) + 0.5) / (all_counts.sum(0) + 1.0)
    return Columns(all_targets, all_counts, torch.logit(mean)[None])


def solve(design: Design, columns: Columns, penalty: float, start: Weights | None = None) -> Weights:
    """The coefficients that minimise each column's penalised loss, from `start` or from zero.

    The loss is the sum of the cross-entropies of both stages (of the only one without a wide part; with groups, half
    with the groups told and half without), plus penalty / 2 * |coefficients|^2.
    """
    count = columns.targets.shape[1]
    origin = design.zeros(count)
    origin.bias = columns.bias.clone()
    penalties = Weights(*(torch.full((1, count), penalty, dtype=torch.float64) for _ in range(5)))
    penalties.bias = torch.full_like(penalties.bias, BIAS_PENALTY)
    used = design.stage_weights

    def loss(at: Weights, stages: Sequence[Tensor]) -> Tensor:
        entropies = [weight * _cross_entropy(stage, columns) for weight, stage in zip(used, stages, strict=True)]
        value = torch.stack(entropies).sum(0)
        away = at.plus(origin, torch.tensor(-1.0))
        scaled = Weights(*(p * a for p, a in zip(penalties.parts(), away.parts(), strict=True)))
        return value + away.dot(scaled) / 2

    def gradient(at: Weights, stages: Sequence[Tensor]) -> Weights:
        of = design.transposed(
            [
                weight * columns.counts * (torch.sigmoid(stage) - columns.targets)
                for weight, stage in zip(used, stages, strict=True)
            ]
        )
        away = at.plus(origin, torch.tensor(-1.0))
        return Weights(*(g + p * a for g, p, a in zip(of.parts(), penalties.parts(), away.parts(), strict=True)))

    at = origin if start is None else start
    stages = design.stages(at)
    value = loss(at, stages)
    first = gradient(origin, design.stages(origin))
    enough = TOLERANCE**2 * first.dot(first).clamp_min(1e-12)
    for _ in range(NEWTON_STEPS):
        slope = gradient(at, stages)
        going = slope.dot(slope) > enough
        if not going.any():
            break
        curved = [weight * columns.counts * _curvature(stage) for weight, stage in zip(used, stages, strict=True)]
        step = _newton_step(design, slope, curved, penalties, going)
        steps = design.stages(step)
        length = going.double()
        for _ in range(HALVINGS):
            tried = at.plus(step, length)
            tried_value = loss(tried, [stage + length * one for stage, one in zip(stages, steps, strict=True)])
            worse = tried_value > value + 1e-9 * value.abs()
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        length = torch.where(tried_value > value + 1e-9 * value.abs(), 0.0, length)
        if not (length > 0).any():
            break
        at = at.plus(step, length)
        stages = tuple(stage + length * one for stage, one in zip(stages, steps, strict=True))
        value = loss(at, stages)
    return at


def _newton_step(
    design: Design, slope: Weights, curved: Sequence[Tensor], penalties: Weights, going: Tensor
) -> Weights:
    """Solves Hessian * step = -slope approximately by conjugate gradients, for the columns that are `going`."""

    def curvature_times(direction: Weights) -> Weights:
        of = design.transposed([c * stage for c, stage in zip(curved, design.stages(direction), strict=True)])
        parts = zip(of.parts(), penalties.parts(), direction.parts(), strict=True)
        return Weights(*(g + p * d for g, p, d in parts))

    step = design.zeros(len(going))
    residual = step.plus(slope, torch.tensor(-1.0))
    direction, squared = residual, residual.dot(residual)
    enough = FORCING**2 * squared
    for _ in range(GRADIENT_STEPS):
        active = going & (squared > enough)
        if not active.any():
            break
        product = curvature_times(direction)
        along = torch.where(active, squared / direction.dot(product).clamp_min(1e-30), 0.0)
        step, residual = step.plus(direction, along), residual.plus(product, -along)
        reduced = residual.dot(residual)
        direction = residual.plus(direction, torch.where(active, reduced / squared.clamp_min(1e-30), 0.0))
        squared = reduced
    return step


def _cross_entropy(logits: Tensor, columns: Columns) -> Tensor:
    """Summed over examples: (C,)."""
    error = torch.nn.functional.softplus(logits) - columns.targets * logits
    return (columns.counts * error).sum(0)


def _curvature(logits: Tensor) -> Tensor:
    probability = torch.sigmoid(logits)
    return (probability * (1 - probability)).clamp_min(SMALLEST_CURVATURE)


def held_out_logits(
    design: Design, weights: Weights, folding: int, foldings: Sequence[NDArray[np.int64]], outputs: int
) -> tuple[Array, Array]:
    """Logits (N, O) of both stages, each example's by the model of its own fold.

    Every fold's model is shifted to the mean logit of the model on everything. A mean moves away from the labels left
    out: without the shift the folds would spread the scores, and rank them against the labels, by that alone.
    """
    before = sum(int(folds.max()) + 1 for folds in foldings[:folding])
    count = len(foldings[folding])  # imputed examples follow
    rows = np.arange(count)[:, None]
    own = (before + foldings[folding])[:, None] * outputs + np.arange(outputs)
    stages = []
    for every in design.logits(weights):
        logits = every[:count]
        shift = logits.mean(0)
        everything = shift[-outputs:].repeat(len(shift) // outputs)
        stages.append((logits - shift + everything).numpy()[rows, own])
    return stages[0], stages[1]


def assign(model: Estimator, design: Design, weights: Weights) -> None:
    """Writes the coefficients of one model, O columns, into an estimator."""
    with torch.no_grad():
        if design.has_wide:
            model.wide_weight.zero_()
            model.wide_weight[torch.from_numpy(design.features)] = design.ngram_weights(weights).float()
            model.surface_weight.copy_(weights.surface)
        model.deep_weight.copy_(weights.deep[: model.width] * DEEP_VARIANCE**0.5)
        if model.config.centres:
            model.similarity.weight.copy_(weights.deep[model.width :] * SIMILARITY_VARIANCE**0.5)
        if model.config.groups:
            model.group_weight.copy_(weights.group * GROUP_VARIANCE**0.5)
        model.bias.copy_(weights.bias[0])
