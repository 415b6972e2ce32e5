"""Chooses the ridge penalty of linear heads by cross-validation, and fits them with it.

Shapes: N examples, K pools, H heads, O = K * H outputs, L outputs with labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import split_heads
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.model import Estimator
from depo_gateway.training.fitting.held_out import HeldOutLogits, held_out_loss
from depo_gateway.training.fitting.imputation import Imputed, with_imputed
from depo_gateway.training.fitting.linear_fit import Design, Weights, assign, columns_of, held_out_logits, solve

PENALTIES = tuple(2.0**power for power in range(7, -4, -1))  # 128 to 1/8, strongest first
PATIENCE = 2  # weaker penalties without a lower held-out loss before the search ends


def fit_linear(
    model: Estimator,
    items: Sequence[Item],
    foldings: Sequence[NDArray[np.int64]],
    imputed: Imputed | None = None,
) -> tuple[list[HeldOutLogits], dict[str, float]]:
    """Fits the linear heads of a model that has its statistics; (held-out predictions by folding, penalties by head).

    Each head gets the penalty with the lowest mean of the foldings' held-out losses. A head without labels keeps zero
    weights. `imputed`: further examples, which count in the fit and not in the losses.
    """
    design = Design(model, items if imputed is None else [*items, *imputed.items])
    heads = len(model.config.heads)
    labels_NHK = torch.tensor([item.labels for item in items], dtype=torch.float64)
    labels_NO = labels_NHK.transpose(1, 2).flatten(1)  # pool by pool, each with its heads in order
    labelled = np.flatnonzero((~labels_NO.isnan()).any(0).numpy())
    weights = torch.tensor([item.weight for item in items], dtype=torch.float64)
    columns = columns_of(labels_NO[:, labelled], weights, foldings)
    if imputed is not None:
        columns = with_imputed(columns, imputed, labelled, heads)
    search = {head: _Search() for head in range(heads) if (labelled % heads == head).any()}
    found: Weights | None = None
    for penalty in tqdm(PENALTIES, desc="fit", unit="penalty", disable=None):
        found = solve(design, columns, penalty, found)
        predictions = [
            HeldOutLogits(
                *(
                    split_heads(_widened(stage, labelled, labels_NO.shape[1]), heads)
                    for stage in held_out_logits(design, found, index, foldings, len(labelled))
                )
            )
            for index in range(len(foldings))
        ]
        last = found.select(np.arange(columns.targets.shape[1] - len(labelled), columns.targets.shape[1]))
        for head, one in search.items():
            loss = sum(held_out_loss(of.full, items, head) for of in predictions) / len(predictions)
            one.offer(loss, penalty, predictions, last)
        if all(one.ended for one in search.values()):
            break
    return _assembled(model, design, search, labelled, foldings, len(items))


@dataclass(slots=True)
class _Search:
    """The penalty of one head with the lowest held-out loss so far, and what it gave."""

    loss: float = np.inf
    penalty: float = np.inf
    since: int = 0
    predictions: Sequence[HeldOutLogits] = ()
    weights: Weights | None = None

    @property
    def ended(self) -> bool:
        return self.since >= PATIENCE

    def offer(self, loss: float, penalty: float, predictions: Sequence[HeldOutLogits], weights: Weights) -> None:
        if self.ended:
            return
        self.since += 1
        if loss < self.loss:
            self.loss, self.penalty, self.since = loss, penalty, 0
            self.predictions, self.weights = predictions, weights


def _assembled(
    model: Estimator,
    design: Design,
    search: Mapping[int, _Search],
    labelled: NDArray[np.int64],
    foldings: Sequence[NDArray[np.int64]],
    count: int,
) -> tuple[list[HeldOutLogits], dict[str, float]]:
    """Puts each head's coefficients into the model, and its held-out predictions together."""
    heads = len(model.config.heads)
    weights = design.zeros(len(model.config.pools) * heads)
    held_out = [HeldOutLogits(*np.zeros((2, count, *model.config.shape))) for _ in foldings]
    for head, one in search.items():
        assert one.weights is not None, "every search has seen a penalty"
        own = labelled % heads == head
        for target, source in zip(weights.parts(), one.weights.parts(), strict=True):
            target[:, torch.from_numpy(labelled[own])] = source[:, torch.from_numpy(np.flatnonzero(own))]
        for into, of in zip(held_out, one.predictions, strict=True):
            into.full[:, :, head], into.cheap[:, :, head] = of.full[:, :, head], of.cheap[:, :, head]
    assign(model, design, weights)
    penalties = {model.config.heads[head]: one.penalty for head, one in search.items()}
    return held_out, penalties


def _widened(stage_NL: Array, labelled: NDArray[np.int64], outputs: int) -> Array:
    """Logits of the labelled outputs (N, L) -> of all (N, O); 0 where there is no label to fit."""
    every = np.zeros((len(stage_NL), outputs))
    every[:, labelled] = stage_NL
    return every
