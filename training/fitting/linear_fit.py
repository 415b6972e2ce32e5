"""Fits linear heads on a frozen encoder: logistic regression with a ridge penalty, solved to convergence.

One model for each fold and one on everything are the columns of one problem, so they share the design matrix. Each
column is solved by Newton's method; a step's linear system by conjugate gradients, which need only products with the
design. The fit has no learning rate, order or epochs: a fold's model differs from the model on everything only by the
examples left out. Many small folds therefore measure the model that is served.

Shapes: N examples, V n-grams that occur in them, S surface features, D embedding width, O outputs of a model,
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

DEEP_VARIANCE = 0.375  # prior variance of the embedding's weights, where the wide part's is 1; from 0.1 to 1 is alike
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
    deep: Tensor  # (D, C), of the embedding times sqrt(DEEP_VARIANCE)
    bias: Tensor  # (1, C)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.wide, self.surface, self.deep, self.bias

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
        embedding = torch.stack([_embedding(item) for item in items]).double()
        scaled = (embedding - model.embedding_mean.double()) * model.embedding_scale.double()
        self.deep = scaled * DEEP_VARIANCE**0.5

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
        sizes = (self._wide.shape[1], self.surface.shape[1], self.deep.shape[1], 1)
        return Weights(*(torch.zeros(size, columns, dtype=torch.float64) for size in sizes))

    def logits(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """(full, cheap), (N, C) each. The cheap stage is the wide part and the bias alone."""
        cheap = self._wide @ weights.wide + self.surface @ weights.surface + weights.bias
        return cheap + self.deep @ weights.deep, cheap

    def transposed(self, full: Tensor, cheap: Tensor) -> Weights:
        """The transpose of `logits`: (N, C) of each stage -> coefficients."""
        both = full + cheap
        return Weights(
            self._wide_transposed @ both, self.surface.T @ both, self.deep.T @ full, both.sum(0, keepdim=True)
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

    The loss is the sum of the cross-entropies of both stages (of the only one without a wide part), plus
    penalty / 2 * |coefficients|^2.
    """
    count = columns.targets.shape[1]
    origin = design.zeros(count)
    origin.bias = columns.bias.clone()
    penalties = Weights(*(torch.full((1, count), penalty, dtype=torch.float64) for _ in range(4)))
    penalties.bias = torch.full_like(penalties.bias, BIAS_PENALTY)
    stages = 1.0 if design.has_wide else 0.0

    def loss(at: Weights, full: Tensor, cheap: Tensor) -> Tensor:
        value = _cross_entropy(full, columns) + stages * _cross_entropy(cheap, columns)
        away = at.plus(origin, torch.tensor(-1.0))
        scaled = Weights(*(p * a for p, a in zip(penalties.parts(), away.parts(), strict=True)))
        return value + away.dot(scaled) / 2

    def gradient(at: Weights, full: Tensor, cheap: Tensor) -> Weights:
        of = design.transposed(
            columns.counts * (torch.sigmoid(full) - columns.targets),
            stages * columns.counts * (torch.sigmoid(cheap) - columns.targets),
        )
        away = at.plus(origin, torch.tensor(-1.0))
        return Weights(*(g + p * a for g, p, a in zip(of.parts(), penalties.parts(), away.parts(), strict=True)))

    at = origin if start is None else start
    full, cheap = design.logits(at)
    value = loss(at, full, cheap)
    first = gradient(origin, *design.logits(origin))
    enough = TOLERANCE**2 * first.dot(first).clamp_min(1e-12)
    for _ in range(NEWTON_STEPS):
        slope = gradient(at, full, cheap)
        going = slope.dot(slope) > enough
        if not going.any():
            break
        curved = (columns.counts * _curvature(full), stages * columns.counts * _curvature(cheap))
        step = _newton_step(design, slope, curved, penalties, going)
        full_step, cheap_step = design.logits(step)
        length = going.double()
        for _ in range(HALVINGS):
            tried = at.plus(step, length)
            tried_value = loss(tried, full + length * full_step, cheap + length * cheap_step)
            worse = tried_value > value + 1e-9 * value.abs()
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        length = torch.where(tried_value > value + 1e-9 * value.abs(), 0.0, length)
        if not (length > 0).any():
            break
        at, full, cheap = at.plus(step, length), full + length * full_step, cheap + length * cheap_step
        value = loss(at, full, cheap)
    return at


def _newton_step(
    design: Design, slope: Weights, curved: tuple[Tensor, Tensor], penalties: Weights, going: Tensor
) -> Weights:
    """Solves Hessian * step = -slope approximately by conjugate gradients, for the columns that are `going`."""

    def curvature_times(direction: Weights) -> Weights:
        full, cheap = design.logits(direction)
        of = design.transposed(curved[0] * full, curved[1] * cheap)
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
        model.deep_weight.copy_(weights.deep * DEEP_VARIANCE**0.5)
        model.bias.copy_(weights.bias[0])
