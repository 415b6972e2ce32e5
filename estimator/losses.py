"""The terms of the estimator's loss. Pure functions, fp32.

Shapes: B prompts of a batch, K pools, cheapest first. z_BK are the logits of the quality head, t_BK its targets. NaN in
a target is a missing label and is masked. w_B weighs prompts. Every term is a mean over the labels that exist, pool by
pool, summed over pools; a term without any label is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

RANKING, MARGIN, TIE = 3.0, 0.5, 0.05


def cross_entropy(logits_BK: Tensor, targets_BK: Tensor, w_B: Tensor) -> Tensor:
    """Mean BCE(logits, targets), pool by pool, summed. The term of each head, scaled as heads.HEADS says."""
    seen = ~targets_BK.isnan()
    weight = w_B[:, None] * seen
    error = binary_cross_entropy_with_logits(logits_BK, torch.where(seen, targets_BK, 0.0), reduction="none")
    return ((weight * error).sum(0) / weight.sum(0).clamp_min(1e-9)).sum()


def ranking(z_BK: Tensor, t_BK: Tensor, w_B: Tensor) -> Tensor:
    """3.0 * mean over pairs with t_i > t_j + 0.05 of max(0, 0.5 - (z_i - z_j)), pool by pool, summed.

    A pair weighs the product of its prompts' weights.
    """
    above_BBK = t_BK[:, None] > t_BK[None, :] + TIE  # comparisons with NaN are false: a missing label makes no pair
    pairs_BBK = above_BBK * (w_B[:, None] * w_B[None, :])[:, :, None]
    hinge_BBK = torch.relu(MARGIN - (z_BK[:, None] - z_BK[None, :]))
    return RANKING * ((pairs_BBK * hinge_BBK).sum((0, 1)) / pairs_BBK.sum((0, 1)).clamp_min(1e-9)).sum()


def gain(z_BK: Tensor, t_BK: Tensor, w_B: Tensor) -> Tensor:
    """Mean squared error of sigmoid(z_b) - sigmoid(z_a) against t_b - t_a, summed over neighbouring pools a, b.

    The rule `gain` routes on this difference; BCE alone mostly fits what the pools have in common.
    """
    if z_BK.shape[1] < 2:
        return z_BK.sum() * 0.0
    predicted, observed = torch.sigmoid(z_BK).diff(dim=1), t_BK.diff(dim=1)
    seen = ~observed.isnan()
    weight = w_B[:, None] * seen
    error = (predicted - torch.where(seen, observed, 0.0)) ** 2
    return ((weight * error).sum(0) / weight.sum(0).clamp_min(1e-9)).sum()
